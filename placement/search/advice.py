"""What a user may change, with its effect, and what the other layout would serve.

All changes are predicted (`sensitivity.predicted_goodput`). The most helpful ones, and the most promising deployments
of the other layout, are then simulated on the same requests as the chosen deployment.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tandem.core.slo_file import Layout, SloFile
from tandem.placement.evidence import Advice, Change, LayoutComparison, SensitivityPoint
from tandem.placement.search.candidate import CandidateDeployment
from tandem.placement.search.changes import ChangedPlan, changes_of
from tandem.placement.search.final_comparison import MAX_INSTANCES, FinalComparison
from tandem.placement.search.mapper import Mapper
from tandem.placement.search.problem import Problem
from tandem.placement.search.sensitivity import predicted_goodput, variations
from tandem.placement.search.simulated_effects import Effect, Variant, simulate_effects
from tandem.placement.search.space import SearchSpace

_NUM_CHANGES = 3  # that are simulated
_NUM_RIVALS = 3  # deployments of the other layout that are simulated,
_NUM_PREDICTED = 6  # selected from those with the highest limits
_LEAST_RATIO = 0.01  # of a first guess to the goodput
_OTHER_LAYOUT: dict[Layout, Layout] = {"disaggregated": "colocated", "colocated": "disaggregated"}


@dataclass(frozen=True, slots=True)
class _Judged:
    """A plan, and its goodput divided by that of the chosen one: `predicted`, and as simulated."""

    plan: ChangedPlan
    predicted: float
    effect: Effect | None = None

    @property
    def ratio(self) -> float:
        return self.predicted if self.effect is None else self.effect.ratio

    @property
    def num_devices(self) -> int:
        return self.plan.deployment.num_devices

    @property
    def cost_per_hour(self) -> float | None:
        return self.plan.problem.cluster.price_per_hour(self.plan.deployment.devices)

    @property
    def usefulness(self) -> float:
        return self.ratio / (self.cost_per_hour or self.num_devices)


def advise(
    slo_file: SloFile,
    space: SearchSpace,
    problem: Problem,
    comparison: FinalComparison,
    sensitivity: Sequence[SensitivityPoint],
    goodput: float,
    mapper: Mapper,
) -> Advice:
    """For the chosen deployment of `comparison`. `problem`: for a trace that of the window that decides. `sensitivity`
    of the chosen deployment has goodputs that are relative to `goodput`. Deployments of many instances are not
    simulated as a whole; for them everything is predicted."""
    unchanged = ChangedPlan(problem, comparison.chosen.deployment)
    rivals = [ChangedPlan(problem, rival) for rival in _rivals(space, unchanged.deployment)]
    plans = [*changes_of(slo_file, problem, unchanged.deployment), *rivals]
    before, *after = mapper(_predicted, [unchanged, *plans])
    if before == 0:
        return Advice((), None)
    predicted = [_Judged(plan, each / before) for plan, each in zip(plans, after, strict=True)]
    changes = sorted(predicted[: len(plans) - len(rivals)], key=lambda each: each.usefulness, reverse=True)
    judged = _simulated(unchanged, goodput, [*changes[:_NUM_CHANGES], *predicted[len(changes) :]], mapper)
    best = sorted(judged[: -len(rivals) or None], key=lambda each: each.usefulness, reverse=True)
    return Advice(
        tuple(_change(each, comparison.goodput) for each in (*best, *changes[_NUM_CHANGES:])),
        _layouts(unchanged, judged[len(best) :], sensitivity, goodput, mapper) if rivals else None,
    )


def _simulated(unchanged: ChangedPlan, goodput: float, judged: Sequence[_Judged], mapper: Mapper) -> list[_Judged]:
    """With what simulations show, those that are simulated before the others."""
    everyone = [unchanged.deployment, *(each.plan.deployment for each in judged)]
    if max(deployment.num_instances for deployment in everyone) > MAX_INSTANCES:
        return list(judged)
    variants = [
        Variant(each.plan.problem, each.plan.deployment, goodput * max(each.predicted, _LEAST_RATIO)) for each in judged
    ]
    effects = simulate_effects(Variant(unchanged.problem, unchanged.deployment, goodput), variants, mapper)
    return [replace(each, effect=effect) for each, effect in zip(judged, effects, strict=True)]


def _change(judged: _Judged, goodput: float) -> Change:
    interval = None if judged.effect is None else judged.effect.interval
    return Change(
        judged.plan.description,
        goodput * judged.ratio,
        judged.num_devices,
        judged.cost_per_hour,
        None if interval is None else (goodput * interval[0], goodput * interval[1]),
    )


def _predicted(plan: ChangedPlan) -> float:
    return predicted_goodput(plan.problem, plan.deployment)


# --- the other layout ------------------------------------------------------------------------------------------------


def _rivals(space: SearchSpace, chosen: CandidateDeployment) -> list[CandidateDeployment]:
    """The deployments of the other layout on the whole cluster with the highest predictions, of those with the highest
    limits; none beside a mixed deployment."""
    layout, predictor = _OTHER_LAYOUT.get(chosen.layout), space.predictor
    of_layout = [each for each in space.deployments(space.problem.node_types) if each.layout == layout]
    promising = heapq.nlargest(_NUM_PREDICTED, of_layout, key=predictor.limit)
    predictor.prepare(promising)
    return heapq.nlargest(_NUM_RIVALS, promising, key=lambda each: predictor.goodput(each) / each.num_devices)


def _layouts(
    unchanged: ChangedPlan,
    rivals: Sequence[_Judged],
    sensitivity: Sequence[SensitivityPoint],
    goodput: float,
    mapper: Mapper,
) -> LayoutComparison:
    """`goodput`: what those of `sensitivity` are relative to."""
    chosen = unchanged.deployment
    rival = max(rivals, key=lambda each: each.ratio / each.num_devices)
    per_device = chosen.num_devices / rival.num_devices
    ratio, effect = rival.ratio * per_device, rival.effect
    varied = list(variations(unchanged.problem))
    problems = [unchanged.problem, *(each.problem for each in varied)]
    before, *after = mapper(_predicted, [ChangedPlan(each, rival.plan.deployment) for each in problems])
    own: dict[tuple[str, float], float] = {
        (each.axis, each.factor): (each.goodput or 0.0) / goodput for each in sensitivity
    }
    changed = []
    for each, of_rival in zip(varied, after, strict=True):
        of_chosen = own[each.axis, each.factor]
        if before > 0 and of_rival + of_chosen > 0:
            change = of_rival / before / of_chosen if of_chosen > 0 else math.inf
            changed.append((each.axis, each.factor, ratio * change))
    return LayoutComparison(
        chosen.layout == "disaggregated",
        str(chosen),
        str(rival.plan.deployment),
        ratio,
        tuple(changed) if ratio > 0 else (),
        None if effect is None else (effect.interval[0] * per_device, effect.interval[1] * per_device),
        len(rivals),
    )
