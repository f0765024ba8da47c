"""All that can be chosen from, and what is known of it without simulating a fleet."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from tandem.placement.search.colocated import colocated
from tandem.placement.search.curves import curve_of
from tandem.placement.search.disaggregated import high_affinity, low_affinity
from tandem.placement.search.fleet import Fleet
from tandem.placement.search.heterogeneous import heterogeneous
from tandem.placement.search.kinds import InstanceKind, Kinds, legal_kinds
from tandem.placement.search.limits import Limit, limit_of
from tandem.placement.search.mixed import mixed
from tandem.placement.search.parallel import Mapper
from tandem.placement.search.predict import Predictor
from tandem.placement.search.problem import NodeType, Problem


@dataclass(frozen=True, slots=True)
class Space:
    """`kinds` are those that can serve at all; `limits` has the others, too, with 0 and the reason."""

    problem: Problem
    kinds: Kinds
    limits: dict[InstanceKind, Limit]
    predictor: Predictor

    @property
    def allows_low_affinity(self) -> bool:
        """KV may be kept inside nodes. By itself only where links between nodes are slow: it restricts the router."""
        asked, cluster = self.problem.section.node_affinity, self.problem.cluster
        return len(cluster.nodes) > 1 and (asked == "low" or (asked == "auto" and cluster.has_slow_links))

    @property
    def allows_high_affinity(self) -> bool:
        return self.problem.section.node_affinity != "low" or len(self.problem.cluster.nodes) == 1

    def fleets(self, nodes: Sequence[NodeType]) -> Iterator[Fleet]:
        """Those that the SLO file's layouts and node affinity allow on these nodes, to which nothing can be added."""
        layouts = self.problem.section.layouts
        if self.allows_high_affinity and not {"disaggregated", "mixed"}.isdisjoint(layouts):
            anywhere = [*high_affinity(self.kinds, nodes), *heterogeneous(self.kinds, self.limits, nodes)]
            if "disaggregated" in layouts:
                yield from anywhere
            if "mixed" in layouts:
                yield from mixed(anywhere, self.kinds, self.limits, nodes)
        if self.allows_low_affinity and "disaggregated" in layouts:
            yield from low_affinity(self.kinds, nodes)
        if "colocated" in layouts:
            yield from colocated(self.kinds, nodes)


def survey(problem: Problem, mapper: Mapper) -> Space:
    """Legal kinds, their limits, and a predictor whose curves `mapper` computes."""
    nodes = [(node.device, node.devices, node.count) for node in problem.node_types]
    legal = legal_kinds(problem.model, problem.source, nodes, problem.section, problem.requests)
    every = (*legal.prefill, *legal.decode, *legal.colocated)
    limits = {kind: limit_of(kind, problem.classes, problem.computed) for kind in every}
    kinds = Kinds(
        prefill=tuple(kind for kind in legal.prefill if limits[kind].rate > 0),
        decode=tuple(kind for kind in legal.decode if limits[kind].rate > 0),
        colocated=tuple(kind for kind in legal.colocated if limits[kind].rate > 0),
        ruled_out=legal.ruled_out,
    )
    compute = partial(curve_of, stream=problem.computed, classes=problem.classes)
    return Space(problem, kinds, limits, Predictor(problem, limits, partial(mapper, compute)))
