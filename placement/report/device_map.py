"""The map of a plan: which device of which node belongs to which instance. Pure; plan.html draws it."""

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.core.plan import Plan, PlanGroup
from tandem.placement.evidence import NodeSummary

_FEW_NODES = 4
_MAX_BOXES = 24
_LETTERS = {"prefill": "P", "decode": "D", "colocated": "C"}


@dataclass(frozen=True, slots=True)
class DeviceCell:
    """One device. `label` names its instance, e.g. P1. A free device has the role 'idle' and an empty label."""

    name: str
    role: str
    label: str


@dataclass(frozen=True, slots=True)
class NodeBox:
    """A node with its devices, or an instance without assigned devices."""

    name: str
    device: str
    cells: tuple[DeviceCell, ...]


@dataclass(frozen=True, slots=True)
class DeviceMap:
    """The boxes to draw. Not drawn: `num_free` nodes without instances, `num_hidden` boxes beyond the maximum."""

    boxes: tuple[NodeBox, ...]
    num_free: int
    num_hidden: int

    def as_text(self) -> str:
        """The map for screen readers: 'node 0 (H100): 0:0 prefill P1, ...'."""
        sentences = []
        for box in self.boxes:
            cells = [f"{cell.name} {cell.role} {cell.label}".rstrip() for cell in box.cells]
            sentences.append(f"{box.name} ({box.device}): {', '.join(cells)}.")
        return " ".join(sentences)


def device_map(plan: Plan, nodes: Sequence[NodeSummary]) -> DeviceMap:
    """The nodes with their devices, then the instances that Ray will place. Nodes without an instance are drawn only
    for clusters of few nodes."""
    placed: dict[str, tuple[str, str]] = {}
    unplaced: list[NodeBox] = []
    for group, labels in zip(plan.groups, instance_labels(plan.groups), strict=True):
        for index, label in enumerate(labels):
            if group.devices:
                placed.update(dict.fromkeys(group.devices[index], (group.role, label)))
            else:
                cells = tuple(DeviceCell("any device", group.role, label) for _ in range(group.shape.num_ranks))
                unplaced.append(NodeBox(f"{group.role} {label}", group.device, cells))
    boxes = [NodeBox(f"node {node.name}", node.device, _cells(node, placed)) for node in nodes]
    used = [box for box in boxes if any(cell.label for cell in box.cells)]
    shown = (boxes if len(boxes) <= _FEW_NODES else used) + unplaced
    num_free = 0 if len(boxes) <= _FEW_NODES else len(boxes) - len(used)
    return DeviceMap(tuple(shown[:_MAX_BOXES]), num_free, max(0, len(shown) - _MAX_BOXES))


def instance_labels(groups: Sequence[PlanGroup]) -> list[list[str]]:
    """Labels of each group's instances: P1, P2, ..., numbered per role over all groups."""
    counts = dict.fromkeys(_LETTERS, 0)
    labels: list[list[str]] = []
    for group in groups:
        first = counts[group.role] + 1
        counts[group.role] += group.instances
        labels.append([f"{_LETTERS[group.role]}{number}" for number in range(first, first + group.instances)])
    return labels


def _cells(node: NodeSummary, placed: dict[str, tuple[str, str]]) -> tuple[DeviceCell, ...]:
    names = [f"{node.name}:{index}" for index in range(node.num_devices)]
    return tuple(DeviceCell(name, *placed.get(name, ("idle", ""))) for name in names)
