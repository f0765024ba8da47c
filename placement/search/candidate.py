"""A candidate deployment: how many instances of which kinds serve together."""

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.core.plan import PlanGroup
from tandem.core.slo_file import Layout
from tandem.placement.search.kinds import InstanceKind


@dataclass(frozen=True, slots=True)
class InstanceGroup:
    """Equal instances."""

    kind: InstanceKind
    instances: int

    @property
    def num_devices(self) -> int:
        return self.instances * self.kind.num_devices

    def __str__(self) -> str:
        return f"{self.instances} x {self.kind}"


@dataclass(frozen=True, slots=True)
class CandidateDeployment:
    """Groups of instances of different kinds.

    `units` > 0: KV stays inside a node (low node affinity), and the deployment consists of `units` equal units. A unit
    occupies `span` nodes. Each instance of a unit has an equal part of its stages on each of these nodes, so stages
    with the same layers are on one node.
    """

    groups: tuple[InstanceGroup, ...]
    units: int = 0
    span: int = 1

    @property
    def num_devices(self) -> int:
        return sum(group.num_devices for group in self.groups)

    @property
    def num_instances(self) -> int:
        return sum(group.instances for group in self.groups)

    @property
    def same_node(self) -> bool:
        return self.units > 0

    @property
    def layout(self) -> Layout:
        roles = {group.kind.role for group in self.groups}
        if "colocated" not in roles:
            return "disaggregated"
        return "colocated" if len(roles) == 1 else "mixed"

    @property
    def devices(self) -> dict[str, int]:
        """Number of devices by type."""
        used: dict[str, int] = {}
        for group in self.groups:
            used[group.kind.device] = used.get(group.kind.device, 0) + group.num_devices
        return used

    @property
    def sends_kv(self) -> bool:
        """Between instances."""
        return any(group.kind.role == "decode" for group in self.groups)

    def with_units(self, units: int) -> "CandidateDeployment":
        """The same units in another number; the deployment has units."""
        groups = tuple(InstanceGroup(group.kind, group.instances // self.units * units) for group in self.groups)
        return CandidateDeployment(groups, units=units, span=self.span)

    def of_role(self, role: str) -> tuple[InstanceGroup, ...]:
        return tuple(group for group in self.groups if group.kind.role == role)

    def __str__(self) -> str:
        devices = sorted(self.devices)
        if len(devices) == 1:
            text = f"{' + '.join(map(str, self.groups))} on {devices[0]}"
        else:
            text = " + ".join(f"{group} on {group.kind.device}" for group in self.groups)
        return text + (", KV inside nodes" if self.same_node else "")

    def plan_groups(self, devices: Sequence[tuple[tuple[str, ...], ...]]) -> tuple[PlanGroup, ...]:
        """The groups of a plan. `devices` has the device names of each group's instances."""
        return tuple(
            PlanGroup(
                role=group.kind.role,
                instances=group.instances,
                device=group.kind.device,
                tp=group.kind.shape.tp,
                pp=group.kind.shape.pp,
                dp=group.kind.shape.dp,
                devices=ranks,
                max_batch_tokens=group.kind.max_batch_tokens,
                max_batch=group.kind.max_batch,
                kv_tokens=group.kind.kv_tokens,
                policy=group.kind.policy,
            )
            for group, ranks in zip(self.groups, devices, strict=True)
        )
