"""Simulated goodput of the best rejected deployments, for the report."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from tandem.placement.search.best_first import EvaluatedDeployment, run_trial, trial_for
from tandem.placement.search.candidate import CandidateDeployment
from tandem.placement.search.kinds import InstanceKind
from tandem.placement.search.mapper import Mapper
from tandem.placement.search.space import SearchSpace

_COUNT = 3


def with_runners_up(
    space: SearchSpace, evaluated: Sequence[EvaluatedDeployment], chosen: CandidateDeployment, mapper: Mapper
) -> tuple[EvaluatedDeployment, ...]:
    """`evaluated` with the goodput of the runners-up: the best of each layout, then the best of the rest."""
    runners = _runners_up(evaluated, chosen)
    trials = [trial_for(space, runner) for runner in runners]
    max_rates = mapper(partial(run_trial, space.problem), trials)
    simulated = {
        runner.deployment: replace(runner, goodput=max_rate.rate * trial.scale)
        for runner, trial, max_rate in zip(runners, trials, max_rates, strict=True)
    }
    return tuple(simulated.get(candidate.deployment, candidate) for candidate in evaluated)


def _runners_up(evaluated: Sequence[EvaluatedDeployment], chosen: CandidateDeployment) -> list[EvaluatedDeployment]:
    """One deployment for each combination of kinds; the best of each layout first."""
    known: set[tuple[InstanceKind, ...]] = {tuple(group.kind for group in chosen.groups)}
    ranked: list[EvaluatedDeployment] = []
    for candidate in sorted(evaluated, key=lambda candidate: -candidate.predicted):
        kinds = tuple(group.kind for group in candidate.deployment.groups)
        if kinds not in known and candidate.predicted > 0:
            known.add(kinds)
            ranked.append(candidate)
    best_of_layout = {candidate.deployment.layout: candidate for candidate in reversed(ranked)}
    rest = [candidate for candidate in ranked if candidate not in best_of_layout.values()]
    return [
        candidate
        for candidate in (*best_of_layout.values(), *rest)
        if candidate.deployment != chosen and not candidate.goodput
    ][:_COUNT]
