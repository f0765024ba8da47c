"""Fleets: how many instances of which kinds serve together."""

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.core.plan import PlanGroup
from tandem.core.slo_file import Layout
from tandem.placement.search.kinds import InstanceKind


@dataclass(frozen=True, slots=True)
class Pool:
    """Instances that are alike."""

    kind: InstanceKind
    instances: int

    @property
    def num_devices(self) -> int:
        return self.instances * self.kind.num_devices

    def __str__(self) -> str:
        return f"{self.instances} x {self.kind}"


@dataclass(frozen=True, slots=True)
class Fleet:
    """Pools of different kinds.

    `units` > 0: KV stays inside a node (low node affinity), and the fleet is that many equal units. A unit has `span`
    nodes to itself, and every instance of it has an equal part of its stages on each of them, so that stages that hold
    the same layers meet on one node.
    """

    pools: tuple[Pool, ...]
    units: int = 0
    span: int = 1

    @property
    def num_devices(self) -> int:
        return sum(pool.num_devices for pool in self.pools)

    @property
    def num_instances(self) -> int:
        return sum(pool.instances for pool in self.pools)

    @property
    def same_node(self) -> bool:
        return self.units > 0

    @property
    def layout(self) -> Layout:
        roles = {pool.kind.role for pool in self.pools}
        if "colocated" not in roles:
            return "disaggregated"
        return "colocated" if len(roles) == 1 else "mixed"

    @property
    def devices(self) -> dict[str, int]:
        """How many of each type."""
        used: dict[str, int] = {}
        for pool in self.pools:
            used[pool.kind.device] = used.get(pool.kind.device, 0) + pool.num_devices
        return used

    def of_role(self, role: str) -> tuple[Pool, ...]:
        return tuple(pool for pool in self.pools if pool.kind.role == role)

    def count(self, role: str) -> int:
        return sum(pool.instances for pool in self.of_role(role))

    def __str__(self) -> str:
        devices = sorted({pool.kind.device for pool in self.pools})
        if len(devices) == 1:
            where = f" on {devices[0]}"
            text = " + ".join(map(str, self.pools)) + where
        else:
            text = " + ".join(f"{pool} on {pool.kind.device}" for pool in self.pools)
        return text + (", KV inside nodes" if self.same_node else "")

    def groups(self, devices: Sequence[tuple[tuple[str, ...], ...]] | None = None) -> tuple[PlanGroup, ...]:
        """As a plan has them; `devices` names those of each pool's instances."""
        named = devices if devices is not None else ((),) * len(self.pools)
        return tuple(
            PlanGroup(
                role=pool.kind.role,
                instances=pool.instances,
                device=pool.kind.device,
                tp=pool.kind.shape.tp,
                pp=pool.kind.shape.pp,
                devices=ranks,
                max_batch_tokens=pool.kind.max_batch_tokens,
                max_batch=pool.kind.max_batch,
                kv_tokens=pool.kind.kv_tokens,
                policy=pool.kind.policy,
            )
            for pool, ranks in zip(self.pools, named, strict=True)
        )
