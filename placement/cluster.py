"""The machines of a cluster: which devices stand where, how they are joined, what they cost."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from tandem.core.errors import ConfigError
from tandem.core.slo_file import ClusterSection, NodeSection
from tandem.placement.costs.calibration import Calibration, load_calibration
from tandem.placement.costs.efficiency import efficiency
from tandem.placement.costs.hardware import Device, device


@dataclass(frozen=True, slots=True)
class Node:
    """One machine. Its devices are called `name`:0, `name`:1, ..., as in `core.plan.PlanGroup.devices`."""

    name: str
    device: Device
    num_devices: int


@dataclass(frozen=True, slots=True)
class Cluster:
    """Nodes are named 0, 1, ... in the order of the SLO file. `calibrations`: what was measured, by type of device."""

    nodes: tuple[Node, ...]
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)

    @classmethod
    def of(cls, section: ClusterSection) -> "Cluster":
        """Reads the calibrations that the section names. Raises ConfigError for one that cannot be read, for a device
        that is not in the catalogue or differs between two sections, and for nodes without a known link."""
        nodes: list[Node] = []
        known: dict[str, tuple[Device, Path | None]] = {}
        for index, described in enumerate(section.nodes):
            found = _device_of(described)
            if known.setdefault(found.name, (found, described.calibration)) != (found, described.calibration):
                raise ConfigError(
                    f"cluster.nodes.{index}: {found.name} has another price, other links or another calibration than "
                    "before; devices of one name must be alike"
                )
            nodes += [Node(str(len(nodes) + i), found, described.devices) for i in range(described.count)]
        unlinked = next((node for node in nodes if not node.device.nic_bytes_per_s), None)
        if unlinked is not None and len(nodes) > 1:
            raise ConfigError(
                f"how fast {unlinked.device.name} reaches other nodes is not known; set nic_gbits_per_s of its nodes"
            )
        measured = {name: load_calibration(path) for name, (_, path) in known.items() if path is not None}
        return cls(tuple(nodes), measured)

    @property
    def devices(self) -> Mapping[str, Device]:
        """Each type of device by its name in the catalogue, with the links and the price that it has here."""
        return MappingProxyType({node.device.name: node.device for node in self.nodes})

    @property
    def devices_per_node(self) -> Mapping[str, int]:
        """By type: how many the largest node has."""
        largest: dict[str, int] = {}
        for node in self.nodes:
            largest[node.device.name] = max(largest.get(node.device.name, 0), node.num_devices)
        return MappingProxyType(largest)

    def price_per_hour(self, used: Mapping[str, int]) -> float | None:
        """USD of so many devices of each type; None if one of them has no price."""
        prices = [(self.devices[name].price_per_hour, count) for name, count in used.items() if count]
        total = 0.0
        for price, count in prices:
            if price is None:
                return None
            total += price * count
        return total

    @property
    def has_slow_links(self) -> bool:
        """Whether KV between nodes is an order of magnitude slower than inside one: then a plan does better if KV
        stays inside (low node affinity)."""
        if len(self.nodes) == 1:
            return False
        return any(device.nic_bytes_per_s * 10 < device.peer_bytes_per_s for device in self.devices.values())


def peer_bytes_per_s(device: Device) -> float:
    """To another device of its node, as measured on the architecture: a share of the peak."""
    return device.peer_bytes_per_s * efficiency(device.family).link.bandwidth


def nic_bytes_per_s(device: Device) -> float:
    """To another node. NICs are taken to reach the same share of their peak; infinite if unknown, where no other node
    is."""
    reached = device.nic_bytes_per_s * efficiency(device.family).link.bandwidth
    return reached or float("inf")


def _device_of(section: NodeSection) -> Device:
    found = device(section.device)
    if section.price_per_device_hour is not None:
        found = replace(found, price_per_hour=section.price_per_device_hour)
    if section.nvlink_gbytes_per_s is not None:
        found = replace(found, nvlink_bytes_per_s=section.nvlink_gbytes_per_s * 1e9)
    if section.nic_gbits_per_s is not None:
        found = replace(found, nic_bytes_per_s=section.nic_gbits_per_s * 1e9 / 8)
    return found
