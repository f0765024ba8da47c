"""What fits on which nodes, and where it then stands. An instance's devices are in one node where it fits in one; a
longer pipeline takes whole nodes, each with as many stages as fit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tandem.placement.cluster import Cluster
from tandem.placement.search.fleet import Fleet, Pool
from tandem.placement.search.kinds import InstanceKind
from tandem.placement.search.problem import NodeType


def capacity(nodes: Sequence[NodeType], kind: InstanceKind) -> int:
    """Instances of `kind` that fit on empty nodes."""
    return beside(nodes, (), kind)


def beside(nodes: Sequence[NodeType], pools: Sequence[Pool], kind: InstanceKind) -> int:
    """Instances of `kind` that fit beside `pools`, which are put on the nodes one after the other."""
    free = [_Free(node.device, node.devices, node.devices, node.count) for node in nodes]
    for pool in pools:
        rest = pool.instances
        left: list[_Free] = []
        for room in free:
            taken = min(rest, room.fitting(pool.kind))
            rest -= taken
            left += room.after(pool.kind, taken) if taken else [room]
        assert rest == 0, "the pools do not fit by themselves"
        free = left
    return sum(room.fitting(kind) for room in free)


def places(fleet: Fleet, cluster: Cluster, *, apart: bool = False) -> list[tuple[tuple[str, ...], ...]]:
    """The devices of every instance of every pool, as `core.plan.PlanGroup.devices` names them. `apart`: pools begin
    on nodes of their own where there are some left, as the pools of a larger fleet would stand."""
    free = [
        _Node(node.device.name, node.num_devices, [f"{node.name}:{index}" for index in range(node.num_devices)])
        for node in cluster.nodes
    ]
    if not fleet.same_node:
        return [
            tuple(_take(room, pool.kind) for _ in range(pool.instances)) for pool, room in _rooms(fleet, free, apart)
        ]
    per_unit = sum(pool.num_devices for pool in fleet.pools) // fleet.units // fleet.span
    device = fleet.pools[0].kind.device
    homes = [node for node in free if node.device == device and len(node.free) >= per_unit]
    chosen: list[list[tuple[str, ...]]] = [[] for _ in fleet.pools]
    for unit in range(fleet.units):
        nodes = homes[unit * fleet.span : (unit + 1) * fleet.span]
        assert len(nodes) == fleet.span, "a unit has no nodes to stand on"
        for instances, pool in zip(chosen, fleet.pools, strict=True):
            for _ in range(pool.instances // fleet.units):
                share = pool.kind.num_devices // fleet.span
                instances.append(tuple(name for node in nodes for name in node.take(share)))
    return [tuple(instances) for instances in chosen]


def _rooms(fleet: Fleet, free: list["_Node"], apart: bool) -> Iterator[tuple[Pool, list["_Node"]]]:
    """Where each pool looks for room, one after the other."""
    for pool in fleet.pools:
        untouched = [node for node in free if node.device == pool.kind.device and len(node.free) == node.devices]
        types = [NodeType(node.device, node.devices, 1) for node in untouched]
        yield pool, untouched if apart and capacity(types, pool.kind) >= pool.instances else free


@dataclass(slots=True)
class _Node:
    device: str
    devices: int
    free: list[str]

    def take(self, count: int) -> list[str]:
        taken, self.free = self.free[:count], self.free[count:]
        assert len(taken) == count, "more devices than the node has"
        return taken


def _take(nodes: list[_Node], kind: InstanceKind) -> tuple[str, ...]:
    """In the first node with room; a pipeline longer than any node takes empty ones, stage by stage."""
    of_type = [node for node in nodes if node.device == kind.device]
    for node in of_type:
        if len(node.free) >= kind.num_devices:
            return tuple(node.take(kind.num_devices))
    names: list[str] = []
    for node in (node for node in of_type if len(node.free) == node.devices):
        stages = min(len(node.free) // kind.shape.tp, (kind.num_devices - len(names)) // kind.shape.tp)
        names += node.take(stages * kind.shape.tp)
    assert len(names) == kind.num_devices, "more instances than the cluster has room for"
    return tuple(names)


@dataclass(frozen=True, slots=True)
class _Free:
    """`count` nodes of `devices` devices, of which `free` each are free."""

    device: str
    devices: int
    free: int
    count: int

    def fitting(self, kind: InstanceKind) -> int:
        if kind.device != self.device:
            return 0
        if kind.num_devices <= self.devices:
            return self.count * (self.free // kind.num_devices)
        is_empty = self.free == self.devices and kind.shape.tp <= self.devices
        return self.count // self._nodes_of(kind) if is_empty else 0

    def after(self, kind: InstanceKind, taken: int) -> Iterator["_Free"]:
        """The same nodes once `taken` instances stand on them: full ones, one in part, untouched ones."""
        if kind.num_devices > self.devices:
            yield replace(self, count=self.count - taken * self._nodes_of(kind))
            return
        each = self.free // kind.num_devices
        full, part = divmod(taken, each)
        yield replace(self, free=self.free - each * kind.num_devices, count=full)
        if part:
            yield replace(self, free=self.free - part * kind.num_devices, count=1)
        yield replace(self, count=self.count - full - (1 if part else 0))

    def _nodes_of(self, kind: InstanceKind) -> int:
        """Nodes that a pipeline longer than any of them takes whole."""
        return -(-kind.shape.pp // (self.devices // kind.shape.tp))
