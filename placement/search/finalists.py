"""Which deployments of a search are compared with its best one, and which of them in detail."""

from collections.abc import Sequence

from tandem.placement.search.best_first import EvaluatedDeployment
from tandem.placement.search.kinds import InstanceKind
from tandem.placement.search.paired_runs import Represented


def finalists_of(
    evaluated: Sequence[EvaluatedDeployment], chosen: EvaluatedDeployment, count: int
) -> list[EvaluatedDeployment]:
    """The best deployment of each combination of kinds beside the chosen one; of all these the best."""
    best: dict[tuple[InstanceKind, ...], EvaluatedDeployment] = {}
    for candidate in evaluated:
        kinds = tuple(group.kind for group in candidate.deployment.groups)
        if candidate.deployment != chosen.deployment and (kinds not in best or _rank(candidate) > _rank(best[kinds])):
            best[kinds] = candidate
    promising = [candidate for candidate in best.values() if candidate.predicted > 0]
    ranked = sorted(promising, key=_rank, reverse=True)
    first_of_layout = {candidate.deployment.layout: candidate for candidate in reversed(ranked)}
    rest = [candidate for candidate in ranked if candidate not in first_of_layout.values()]
    return [*first_of_layout.values(), *rest][:count]


def most_promising(others: Sequence[Represented], count: int) -> list[Represented]:
    """The best of each layout, then the best `count` of the rest."""
    ranked = sorted(others, key=lambda one: _rank(one.candidate), reverse=True)
    first_of_layout = {one.candidate.deployment.layout: one for one in reversed(ranked)}
    rest = [one for one in ranked if one not in first_of_layout.values()]
    return [*first_of_layout.values(), *rest[:count]]


def _rank(candidate: EvaluatedDeployment) -> tuple[float, float]:
    return (candidate.goodput or 0.0, candidate.predicted)
