"""Fleets of which a part is disaggregated and a part colocated.

The parts gain little from each other (what one cannot take at a moment, the other often can), so a mixture beats both
only where devices are left over, or differ: a pair of phases that leaves two devices of a node idle, H100s for both
phases and a few A100s beside them. Every disaggregated fleet is therefore offered with the best colocated instances in
the room that it leaves, and with one instance less.
"""

from collections.abc import Iterable, Iterator, Sequence

from tandem.placement.search.fleet import Fleet, Pool
from tandem.placement.search.kinds import Kinds
from tandem.placement.search.predict import Limits
from tandem.placement.search.problem import NodeType
from tandem.placement.search.room import beside


def mixed(fleets: Iterable[Fleet], kinds: Kinds, limits: Limits, nodes: Sequence[NodeType]) -> Iterator[Fleet]:
    """`fleets`, each with one more pool of colocated instances; those without room for one are left out."""
    for fleet in fleets:
        for pools in (fleet.pools, *_one_less(fleet.pools)):
            best: Pool | None = None
            for kind in kinds.colocated:
                if fitting := beside(nodes, pools, kind):
                    offered = Pool(kind, fitting)
                    if best is None or _worth(offered, limits) > _worth(best, limits):
                        best = offered
            if best is not None and _worth(best, limits) > 0:
                yield Fleet((*pools, best))


def _one_less(pools: tuple[Pool, ...]) -> Iterator[tuple[Pool, ...]]:
    for index, pool in enumerate(pools):
        if pool.instances > 1:
            yield (*pools[:index], Pool(pool.kind, pool.instances - 1), *pools[index + 1 :])


def _worth(pool: Pool, limits: Limits) -> float:
    return pool.instances * limits[pool.kind].rate
