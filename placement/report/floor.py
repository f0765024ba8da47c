"""The plan as a picture: which device of which node does what. Pure; the page draws it."""

from collections.abc import Sequence
from dataclasses import dataclass

from core.plan import Plan, PlanGroup
from placement.evidence import NodeSummary

MAX_NODES = 24
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


def floor_plan(plan: Plan, nodes: Sequence[NodeSummary]) -> tuple[NodeBox, ...]:
    """The nodes with their devices, then the instances whose place is left to Ray."""
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
    return tuple(boxes) + tuple(unplaced)


def instance_labels(groups: Sequence[PlanGroup]) -> list[list[str]]:
    """Labels of each group's instances: P1, P2, ... counted per role over all groups."""
    counts = dict.fromkeys(_LETTERS, 0)
    labels: list[list[str]] = []
    for group in groups:
        first = counts[group.role] + 1
        counts[group.role] += group.instances
        labels.append([f"{_LETTERS[group.role]}{number}" for number in range(first, first + group.instances)])
    return labels


def describe_floor(boxes: Sequence[NodeBox]) -> str:
    """For those who do not see the picture: 'node n0: n0:0 prefill P1, ...'."""
    sentences = []
    for box in boxes:
        used = [f"{cell.name} {cell.role} {cell.label}".rstrip() for cell in box.cells]
        sentences.append(f"{box.name} ({box.device}): {', '.join(used)}.")
    return " ".join(sentences)


def _cells(node: NodeSummary, placed: dict[str, tuple[str, str]]) -> tuple[DeviceCell, ...]:
    names = [f"{node.name}:{index}" for index in range(node.num_devices)]
    return tuple(DeviceCell(name, *placed.get(name, ("idle", ""))) for name in names)
