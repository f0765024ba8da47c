"""The search space of a problem: kinds, limits, candidate deployments and predictions without full simulations."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from tandem.placement.search.candidate import CandidateDeployment
from tandem.placement.search.enumeration import colocated, heterogeneous, high_affinity, low_affinity, mixed
from tandem.placement.search.group_attainment import group_attainment
from tandem.placement.search.kinds import BUDGET_FACTORS, Kinds, legal_kinds, with_budget, with_slack
from tandem.placement.search.limits import KindLimits, limit_of, limits_of_variants
from tandem.placement.search.mapper import Mapper
from tandem.placement.search.predict import Predictor
from tandem.placement.search.problem import NodeType, Problem
from tandem.placement.search.slower_shapes import without_slower_shapes


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """`kinds` can meet the targets; `limits` also has the other kinds, with the limit 0 and the reason."""

    problem: Problem
    kinds: Kinds
    limits: KindLimits
    predictor: Predictor

    @property
    def allows_low_affinity(self) -> bool:
        """Whether KV may be restricted to nodes. The restriction limits the router, so `auto` needs slow links."""
        affinity, cluster = self.problem.section.node_affinity, self.problem.cluster
        return len(cluster.nodes) > 1 and (affinity == "low" or (affinity == "auto" and cluster.has_slow_links))

    @property
    def allows_high_affinity(self) -> bool:
        return self.problem.section.node_affinity != "low" or len(self.problem.cluster.nodes) == 1

    def deployments(self, nodes: Sequence[NodeType]) -> Iterator[CandidateDeployment]:
        """The maximal deployments on these nodes that the SLO file's layouts and node affinity allow."""
        layouts = self.problem.section.layouts
        if self.allows_high_affinity and not {"disaggregated", "mixed"}.isdisjoint(layouts):
            disaggregated = [*high_affinity(self.kinds, nodes), *heterogeneous(self.kinds, self.limits, nodes)]
            if "disaggregated" in layouts:
                yield from disaggregated
            if "mixed" in layouts:
                yield from mixed(disaggregated, self.kinds, self.limits, nodes)
        if self.allows_low_affinity and "disaggregated" in layouts:
            # A served instance sends all of its KV from rank 0's node: that of stages on other nodes leaves theirs.
            may_span = not self.problem.section.only_served
            yield from (each for each in low_affinity(self.kinds, nodes) if may_span or each.span == 1)
        if "colocated" in layouts:
            yield from colocated(self.kinds, nodes)


def search_space(problem: Problem, mapper: Mapper) -> SearchSpace:
    """Legal kinds, their limits, and a predictor that evaluates groups through `mapper`."""
    nodes = [(node.device, node.devices, node.count) for node in problem.node_types]
    every = legal_kinds(
        problem.model,
        problem.source,
        nodes,
        problem.section,
        problem.requests,
        one_rank=problem.one_rank_devices,
    )
    legal = without_slower_shapes(every, problem.requests)
    all_kinds = (*legal.prefill, *legal.decode, *legal.colocated)
    limits = {kind: limit_of(kind, problem.classes, problem.computed) for kind in all_kinds}
    budgets = [limits_of_variants(limits, partial(with_budget, factor=factor)) for factor in BUDGET_FACTORS]
    for of_budget in budgets:
        limits |= of_budget
    limits |= limits_of_variants(limits, partial(with_slack, calibrations=problem.cluster.calibrations))
    kinds = Kinds(
        prefill=tuple(kind for kind in legal.prefill if limits[kind].rate > 0),
        decode=tuple(kind for kind in legal.decode if limits[kind].rate > 0),
        colocated=tuple(kind for kind in legal.colocated if limits[kind].rate > 0),
        rejected=legal.rejected,
        slower=legal.slower,
    )
    compute = partial(group_attainment, stream=problem.computed, classes=problem.classes)
    return SearchSpace(problem, kinds, limits, Predictor(problem, limits, partial(mapper, compute)))
