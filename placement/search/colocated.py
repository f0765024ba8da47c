"""Fleets of instances that serve both phases: what the planner answers when disaggregation does not pay."""

from collections.abc import Iterator, Sequence

from tandem.placement.search.fleet import Fleet, Pool
from tandem.placement.search.kinds import Kinds
from tandem.placement.search.problem import NodeType
from tandem.placement.search.room import capacity


def colocated(kinds: Kinds, nodes: Sequence[NodeType]) -> Iterator[Fleet]:
    """As many instances of one kind as fit. On devices of other types, of which they leave none out, see `mixed`."""
    for kind in kinds.colocated:
        if fitting := capacity(nodes, kind):
            yield Fleet((Pool(kind, fitting),))
