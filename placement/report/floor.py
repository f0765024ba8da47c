"""The plan as a picture: which device of which node does what. Pure; the page draws it."""

from collections.abc import Sequence
from dataclasses import dataclass

from tandem.core.plan import Plan, PlanGroup
from tandem.placement.evidence import NodeSummary

_FEW_NODES = 4
_MAX_BOXES = 24
_LETTERS = {"prefill": "P", "decode": "D", "colocated": "C"}


@dataclass(frozen=True, slots=True)
class DeviceCell:
    """One device. `role` is 'idle' and `label` empty where the plan leaves it free; `label` names its instance, P1."""

    name: str
    role: str
    label: str


@dataclass(frozen=True, slots=True)
class NodeBox:
    """`instances` that the plan binds to no device stand in boxes of their own, with an empty `device`."""

    name: str
    device: str
    cells: tuple[DeviceCell, ...]


@dataclass(frozen=True, slots=True)
class FloorPlan:
    """What is drawn, and how many nodes are not: `num_free` have no instance, `num_hidden` are too many to see."""

    boxes: tuple[NodeBox, ...]
    num_free: int
    num_hidden: int

    def in_words(self) -> str:
        """For those who do not see the picture: 'node 0 (H100): 0:0 prefill P1, ...'."""
        sentences = []
        for box in self.boxes:
            cells = [f"{cell.name} {cell.role} {cell.label}".rstrip() for cell in box.cells]
            sentences.append(f"{box.name} ({box.device}): {', '.join(cells)}.")
        return " ".join(sentences)


def floor_plan(plan: Plan, nodes: Sequence[NodeSummary]) -> FloorPlan:
    """The nodes with their devices, then the instances whose place is left to Ray. Nodes without an instance are drawn
    where there are few."""
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
    return FloorPlan(tuple(shown[:_MAX_BOXES]), num_free, max(0, len(shown) - _MAX_BOXES))


def instance_labels(groups: Sequence[PlanGroup]) -> list[list[str]]:
    """Labels of each group's instances: P1, P2, ... counted per role over all groups."""
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
