"""Fleets with the two phases on separate instances: DistServe's two algorithms (OSDI 2024, section 4).

Algorithm 1, high node affinity: KV may move between any two nodes, so each phase is chosen alone: any prefill kind with
any decode kind, n and m instances by what each can pass, n and m unequal, their devices of different types if need be.

Algorithm 2, low node affinity: KV stays inside a node. A unit of n prefill and m decode instances shares a node, or,
cut into as many segments of stages, `span` nodes that each hold the same layers of both phases; the fleet is as many
units as there are nodes for. DistServe has n = m = 1.

Only fleets to which no instance can be added are named: those with fewer are found on fewer devices.
"""

from collections.abc import Iterator, Sequence

from tandem.placement.search.fleet import Fleet, Pool
from tandem.placement.search.kinds import InstanceKind, Kinds
from tandem.placement.search.problem import NodeType
from tandem.placement.search.room import beside, capacity

_EXACT_COUNT = 12
_COUNT_STEP = 1.05
_MAX_SPAN = 4


def high_affinity(kinds: Kinds, nodes: Sequence[NodeType]) -> Iterator[Fleet]:
    """Algorithm 1's choices."""
    for prefill in kinds.prefill:
        for count in _counts(capacity(nodes, prefill)):
            pool = Pool(prefill, count)
            for decode in kinds.decode:
                beside_it = beside(nodes, [pool], decode)
                if beside_it:
                    yield Fleet((pool, Pool(decode, beside_it)))


def low_affinity(kinds: Kinds, nodes: Sequence[NodeType]) -> Iterator[Fleet]:
    """Algorithm 2's choices, on nodes of one type at a time."""
    for node in nodes:
        for span in range(1, min(node.count, _MAX_SPAN) + 1):
            units = node.count // span
            for prefill in _segments(kinds.prefill, node, span):
                for decode in _segments(kinds.decode, node, span):
                    for count in range(1, node.devices // _share(prefill, span) + 1):
                        rest = node.devices - count * _share(prefill, span)
                        if fitting := rest // _share(decode, span):
                            pools = Pool(prefill, units * count), Pool(decode, units * fitting)
                            yield Fleet(pools, units=units, span=span)


def _segments(kinds: Sequence[InstanceKind], node: NodeType, span: int) -> list[InstanceKind]:
    """Kinds whose stages divide over `span` nodes of this type, and fit them."""
    return [
        kind
        for kind in kinds
        if kind.device == node.device and kind.shape.pp % span == 0 and _share(kind, span) <= node.devices
    ]


def _share(kind: InstanceKind, span: int) -> int:
    """Devices of an instance on each of its nodes."""
    return kind.num_devices // span


def _counts(most: int) -> Iterator[int]:
    """1 to `most`: every number while they are small, then in steps of 5 %, which no measurement tells apart."""
    count = 1
    while count <= most:
        yield count
        count = max(count + 1, round(count * _COUNT_STEP)) if count >= _EXACT_COUNT else count + 1
