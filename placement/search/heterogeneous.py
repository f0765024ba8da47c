"""Fleets on devices of several types that `disaggregated` does not name: two pools of different devices in one phase.

The first type serves both phases, another helps with the one or the other, by its best kind. (One phase per type, H100s
for prefill and A100s for decode, is among `disaggregated.high_affinity`'s fleets; one type colocated beside the others
is `mixed`.)
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from tandem.placement.search.disaggregated import high_affinity
from tandem.placement.search.fleet import Fleet, Pool
from tandem.placement.search.kinds import InstanceKind, Kinds
from tandem.placement.search.predict import Limits
from tandem.placement.search.problem import NodeType
from tandem.placement.search.room import capacity


def heterogeneous(kinds: Kinds, limits: Limits, nodes: Sequence[NodeType]) -> Iterator[Fleet]:
    """Nothing where all devices are of one type."""
    devices = sorted({node.device for node in nodes})
    for first in devices:
        own = replace(kinds, prefill=_of(kinds.prefill, first), decode=_of(kinds.decode, first))
        for other in devices:
            helpers = [
                max(candidates, key=lambda pool: pool.instances * limits[pool.kind].rate)
                for role in (kinds.prefill, kinds.decode)
                if (candidates := [Pool(kind, n) for kind in _of(role, other) if (n := capacity(nodes, kind))])
            ]
            if other != first:
                for fleet in high_affinity(own, [node for node in nodes if node.device == first]):
                    yield from (Fleet((*fleet.pools, helper)) for helper in helpers)


def _of(kinds: Sequence[InstanceKind], device: str) -> tuple[InstanceKind, ...]:
    return tuple(kind for kind in kinds if kind.device == device)
