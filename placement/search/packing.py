"""How many instances fit on the nodes, and the devices of each instance. An instance that fits one node has its devices
on one node. A longer pipeline takes whole nodes, each with as many stages as fit."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tandem.placement.cluster import Cluster
from tandem.placement.search.candidate import CandidateDeployment, InstanceGroup
from tandem.placement.search.kinds import InstanceKind
from tandem.placement.search.problem import NodeType


def count_fitting(nodes: Sequence[NodeType], kind: InstanceKind, *, beside: Sequence[InstanceGroup] = ()) -> int:
    """How many instances of `kind` fit on the nodes after the groups `beside` were placed in order."""
    free = [_FreeNodes(node.device, node.devices, node.devices, node.count) for node in nodes]
    for group in beside:
        rest = group.instances
        left: list[_FreeNodes] = []
        for node in free:
            taken = min(rest, node.fitting(group.kind))
            rest -= taken
            left += node.after(group.kind, taken) if taken else [node]
        assert rest == 0, "the groups fit the nodes"
        free = left
    return sum(node.fitting(kind) for node in free)


def assign_devices(
    deployment: CandidateDeployment, cluster: Cluster, *, separate_nodes: bool = False
) -> list[tuple[tuple[str, ...], ...]]:
    """The device names of each instance of each group, as in `core.plan.PlanGroup.devices`. `separate_nodes`: a group
    uses only empty nodes if enough are left, as the groups of a larger deployment would."""
    free = [
        _FreeDevices(node.device.name, node.num_devices, [f"{node.name}:{index}" for index in range(node.num_devices)])
        for node in cluster.nodes
    ]
    if not deployment.same_node:
        return [
            tuple(_take(nodes, group.kind) for _ in range(group.instances))
            for group, nodes in _nodes_of_groups(deployment, free, separate_nodes)
        ]
    per_node = deployment.num_devices // deployment.units // deployment.span
    device = deployment.groups[0].kind.device
    eligible = [node for node in free if node.device == device and len(node.names) >= per_node]
    assigned: list[list[tuple[str, ...]]] = [[] for _ in deployment.groups]
    for unit in range(deployment.units):
        nodes = eligible[unit * deployment.span : (unit + 1) * deployment.span]
        assert len(nodes) == deployment.span, "there are nodes for every unit"
        for instances, group in zip(assigned, deployment.groups, strict=True):
            for _ in range(group.instances // deployment.units):
                share = group.kind.num_devices // deployment.span
                instances.append(tuple(name for node in nodes for name in node.take(share)))
    return [tuple(instances) for instances in assigned]


def _nodes_of_groups(
    deployment: CandidateDeployment, free: list["_FreeDevices"], separate_nodes: bool
) -> Iterator[tuple[InstanceGroup, list["_FreeDevices"]]]:
    """Each group with the nodes for it. The caller takes devices between two items."""
    for group in deployment.groups:
        empty = [node for node in free if node.device == group.kind.device and len(node.names) == node.devices]
        types = [NodeType(node.device, node.devices, 1) for node in empty]
        yield group, empty if separate_nodes and count_fitting(types, group.kind) >= group.instances else free


@dataclass(slots=True)
class _FreeDevices:
    """The free devices of one node, which has `devices` in total."""

    device: str
    devices: int
    names: list[str]

    def take(self, count: int) -> list[str]:
        taken, self.names = self.names[:count], self.names[count:]
        assert len(taken) == count, "the node has enough free devices"
        return taken


def _take(nodes: list[_FreeDevices], kind: InstanceKind) -> tuple[str, ...]:
    """Devices of the first node with enough free devices. A pipeline longer than any node takes empty nodes."""
    of_type = [node for node in nodes if node.device == kind.device]
    for node in of_type:
        if len(node.names) >= kind.num_devices:
            return tuple(node.take(kind.num_devices))
    names: list[str] = []
    for node in (node for node in of_type if len(node.names) == node.devices):
        stages = min(len(node.names) // kind.shape.tp, (kind.num_devices - len(names)) // kind.shape.tp)
        names += node.take(stages * kind.shape.tp)
    assert len(names) == kind.num_devices, "the deployment fits the cluster"
    return tuple(names)


@dataclass(frozen=True, slots=True)
class _FreeNodes:
    """`count` nodes of `devices` devices; `free` devices of each node are free."""

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
        return self.count // self._nodes_per_instance(kind) if is_empty else 0

    def after(self, kind: InstanceKind, taken: int) -> Iterator["_FreeNodes"]:
        """The nodes after `taken` instances were placed: full nodes, a node with a part of the instances, unused
        nodes."""
        if kind.num_devices > self.devices:
            yield replace(self, count=self.count - taken * self._nodes_per_instance(kind))
            return
        per_node = self.free // kind.num_devices
        full, part = divmod(taken, per_node)
        yield replace(self, free=self.free - per_node * kind.num_devices, count=full)
        if part:
            yield replace(self, free=self.free - part * kind.num_devices, count=1)
        yield replace(self, count=self.count - full - (1 if part else 0))

    def _nodes_per_instance(self, kind: InstanceKind) -> int:
        """Nodes of a pipeline that is longer than one node."""
        return -(-kind.shape.pp // (self.devices // kind.shape.tp))
