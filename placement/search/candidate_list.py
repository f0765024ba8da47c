"""The list of candidates in a report: the chosen deployment, and the rejected ones with reasons."""

from dataclasses import replace

from tandem.placement.evidence import PlanCandidate
from tandem.placement.search.best_first import EvaluatedDeployment
from tandem.placement.search.candidate import CandidateDeployment
from tandem.placement.search.final_comparison import ComparedAlternative, FinalComparison
from tandem.placement.search.kinds import Kinds
from tandem.placement.search.limits import KindLimits
from tandem.placement.search.problem import Problem
from tandem.placement.search.space import SearchSpace


def list_candidates(space: SearchSpace, comparison: FinalComparison) -> tuple[PlanCandidate, ...]:
    """The chosen deployment, its compared alternatives in falling goodput per device, and the shapes that cannot meet
    the targets."""
    problem, chosen = space.problem, comparison.chosen.candidate
    rejected = [
        _candidate(problem, alternative.candidate, reason=_reason(space, alternative, comparison))
        for alternative in comparison.alternatives
    ]
    rejected.sort(key=lambda candidate: (-(candidate.goodput_per_device or 0.0), candidate.description))
    first = replace(_candidate(problem, chosen), goodput=comparison.goodput, chosen=True)
    return (first, *rejected, *rejected_shapes(space.kinds, space.limits))


def rejected_shapes(kinds: Kinds, limits: KindLimits) -> tuple[PlanCandidate, ...]:
    """Shapes that were rejected without simulation."""
    illegal = [
        PlanCandidate(
            str(shape),
            "colocated" if shape.role == "colocated" else "disaggregated",
            shape.shape.num_ranks,
            reason=shape.reason,
        )
        for shape in (*kinds.slower, *kinds.rejected)
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


def _candidate(problem: Problem, evaluated: EvaluatedDeployment, reason: str = "") -> PlanCandidate:
    deployment = evaluated.deployment
    return PlanCandidate(
        str(deployment),
        deployment.layout,
        deployment.num_devices,
        goodput=evaluated.goodput or None,
        cost_per_hour=problem.cluster.price_per_hour(deployment.devices),
        reason=reason,
    )


def _reason(space: SearchSpace, alternative: ComparedAlternative, comparison: FinalComparison) -> str:
    evaluated, chosen = alternative.candidate, comparison.chosen.candidate
    bound = f"the bottleneck is {bottleneck(space, evaluated.deployment)}"
    if not evaluated.goodput:
        return f"misses its targets at the rate of the chosen deployment: {bound}"
    if evaluated.goodput >= comparison.goodput and evaluated.deployment.num_devices > chosen.deployment.num_devices:
        return "needs more devices for the same goodput"
    if alternative.is_equal and alternative.difference is not None:
        low, high = (0 - 100 * end for end in reversed(alternative.difference))
        requests = comparison.problem.section.requests
        return (
            f"as good as the chosen one: at the same rate {low:+.1f} to {high:+.1f} points of attainment "
            f"(95 %, {requests:,} equal requests)"
        )
    return f"{1 - evaluated.goodput / comparison.goodput:.0%} less goodput: {bound}"
