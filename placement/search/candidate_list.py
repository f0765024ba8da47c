"""The list of candidates in a report: the chosen deployment, and the rejected ones with reasons."""

from collections.abc import Iterable

from tandem.placement.evidence import PlanCandidate
from tandem.placement.search.best_first import EvaluatedDeployment
from tandem.placement.search.candidate import CandidateDeployment
from tandem.placement.search.kinds import InstanceKind, Kinds
from tandem.placement.search.limits import KindLimits
from tandem.placement.search.problem import Problem
from tandem.placement.search.space import SearchSpace

_MAX_REJECTED = 24


def list_candidates(
    space: SearchSpace, chosen: EvaluatedDeployment, goodput: float, others: Iterable[EvaluatedDeployment]
) -> tuple[PlanCandidate, ...]:
    """The chosen deployment, the best rejected deployment of each combination of kinds in falling goodput per device,
    and the shapes that cannot meet the targets."""
    problem = space.problem
    best: dict[tuple[InstanceKind, ...], EvaluatedDeployment] = {}
    for evaluated in others:
        kinds = tuple(group.kind for group in evaluated.deployment.groups)
        if evaluated.deployment != chosen.deployment and (kinds not in best or _rank(evaluated) > _rank(best[kinds])):
            best[kinds] = evaluated
    rejected = [
        _rejected(problem, evaluated, _reason(space, evaluated, chosen, goodput)) for evaluated in best.values()
    ]
    rejected.sort(key=lambda candidate: (-(candidate.goodput_per_device or 0.0), candidate.description))
    first = PlanCandidate(
        str(chosen.deployment),
        chosen.deployment.layout,
        chosen.deployment.num_devices,
        goodput=goodput,
        cost_per_hour=problem.cluster.price_per_hour(chosen.deployment.devices),
        chosen=True,
    )
    return (first, *rejected[:_MAX_REJECTED], *rejected_shapes(space.kinds, space.limits))


def rejected_shapes(kinds: Kinds, limits: KindLimits) -> tuple[PlanCandidate, ...]:
    """Shapes that were rejected without simulation."""
    illegal = [
        PlanCandidate(f"{shape.shape} on {shape.device}", "disaggregated", shape.shape.num_ranks, reason=shape.reason)
        for shape in kinds.rejected
    ]
    too_slow = [
        PlanCandidate(
            f"{kind} on {kind.device}",
            "colocated" if kind.role == "colocated" else "disaggregated",
            kind.num_devices,
            reason=limit.reason,
        )
        for kind, limit in limits.items()
        if limit.rate == 0
    ]
    return (*illegal, *too_slow)


def bottleneck(space: SearchSpace, deployment: CandidateDeployment) -> str:
    """The phase with the lowest limit, and its bound. Colocated instances of a mixed deployment do not count: they add
    to both phases."""
    limits: dict[str, list[tuple[float, str]]] = {}
    for group in deployment.groups:
        if deployment.layout == "mixed" and group.kind.role == "colocated":
            continue
        limit = space.limits[group.kind]
        limits.setdefault(group.kind.role, []).append((group.instances * limit.rate, limit.reason))
    lowest = min(limits, key=lambda role: sum(rate for rate, _ in limits[role]))
    return f"{lowest} ({limits[lowest][0][1]})"


def _rank(evaluated: EvaluatedDeployment) -> tuple[float, float]:
    return (evaluated.goodput or 0.0, evaluated.predicted)


def _rejected(problem: Problem, evaluated: EvaluatedDeployment, reason: str) -> PlanCandidate:
    deployment = evaluated.deployment
    return PlanCandidate(
        str(deployment),
        deployment.layout,
        deployment.num_devices,
        goodput=evaluated.goodput or None,
        cost_per_hour=problem.cluster.price_per_hour(deployment.devices),
        reason=reason,
    )


def _reason(space: SearchSpace, evaluated: EvaluatedDeployment, chosen: EvaluatedDeployment, goodput: float) -> str:
    bound = f"the bottleneck is {bottleneck(space, evaluated.deployment)}"
    if evaluated.goodput:
        if evaluated.goodput >= goodput:
            is_larger = evaluated.deployment.num_devices > chosen.deployment.num_devices
            return "needs more devices for the same goodput" if is_larger else "had a lower predicted goodput"
        return f"{1 - evaluated.goodput / goodput:.0%} less goodput: {bound}"
    if evaluated.goodput == 0.0:
        return f"misses its targets at the rate of the chosen deployment: {bound}"
    return f"predicted goodput at most {evaluated.predicted:.3g} req/s: {bound}"
