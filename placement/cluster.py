"""The machines of a cluster: devices, links and prices."""

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
class ClusterNode:
    """One machine. Its devices have the names `name`:0, `name`:1, ..., as in `core.plan.PlanGroup.devices`."""

    name: str
    device: Device
    num_devices: int


@dataclass(frozen=True, slots=True)
class Cluster:
    """Nodes have the names 0, 1, ... in the order of the SLO file. `calibrations` are by type of device."""

    nodes: tuple[ClusterNode, ...]
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)

    @classmethod
    def of(cls, section: ClusterSection) -> "Cluster":
        """Reads the calibrations of the section. Raises ConfigError for a calibration that cannot be read, for a device
        that is not in the catalogue or differs between two entries, and for several nodes without a known NIC."""
        nodes: list[ClusterNode] = []
        known: dict[str, tuple[Device, Path | None]] = {}
        for index, entry in enumerate(section.nodes):
            described = _device_of(entry), entry.calibration
            kind = described[0]
            if known.setdefault(kind.name, described) != described:
                raise ConfigError(
                    f"cluster.nodes.{index}: {kind.name} differs from an earlier entry in price, links or calibration; "
                    "give all nodes of one device the same settings"
                )
            nodes += [ClusterNode(str(len(nodes) + i), kind, entry.devices) for i in range(entry.count)]
        unlinked = next((node for node in nodes if not node.device.nic_bytes_per_s), None)
        if unlinked is not None and len(nodes) > 1:
            raise ConfigError(f"the NIC speed of {unlinked.device.name} is unknown; set nic_gbits_per_s of its nodes")
        measured = {name: load_calibration(path) for name, (_, path) in known.items() if path is not None}
        return cls(tuple(nodes), measured)

    @property
    def devices(self) -> Mapping[str, Device]:
        """Types of device by name in the catalogue, with the links and prices of this cluster."""
        return MappingProxyType({node.device.name: node.device for node in self.nodes})

    @property
    def devices_per_node(self) -> Mapping[str, int]:
        """Devices in the largest node, by type."""
        largest: dict[str, int] = {}
        for node in self.nodes:
            largest[node.device.name] = max(largest.get(node.device.name, 0), node.num_devices)
        return MappingProxyType(largest)

    def price_per_hour(self, used: Mapping[str, int]) -> float | None:
        """USD of `used` devices of each type; None if a device has no known price."""
        total = 0.0
        for name, count in used.items():
            price = self.devices[name].price_per_hour
            if price is None and count:
                return None
            total += (price or 0.0) * count
        return total

    @property
    def has_slow_links(self) -> bool:
        """Whether links between nodes are at least 10 times slower than links inside a node: then KV should stay inside
        a node (low node affinity)."""
        if len(self.nodes) == 1:
            return False
        return any(device.nic_bytes_per_s * 10 < device.peer_bytes_per_s for device in self.devices.values())


def peer_bytes_per_s(device: Device) -> float:
    """Measured bandwidth to another device of the same node."""
    return device.peer_bytes_per_s * efficiency(device.family).link.bandwidth


def nic_bytes_per_s(device: Device) -> float:
    """Bandwidth to another node, at the same share of the peak as links inside a node. Infinite if the NIC is unknown:
    a cluster of one node does not use it."""
    return device.nic_bytes_per_s * efficiency(device.family).link.bandwidth or float("inf")


def _device_of(section: NodeSection) -> Device:
    kind = device(section.device)
    if section.price_per_device_hour is not None:
        kind = replace(kind, price_per_hour=section.price_per_device_hour)
    if section.nvlink_gbytes_per_s is not None:
        kind = replace(kind, nvlink_bytes_per_s=section.nvlink_gbytes_per_s * 1e9)
    if section.nic_gbits_per_s is not None:
        kind = replace(kind, nic_bytes_per_s=section.nic_gbits_per_s * 1e9 / 8)
    return kind
