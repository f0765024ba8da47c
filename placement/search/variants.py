"""Deployments beside those of the search, with other settings of their colocated instances.

The search's prediction of colocated instances is for a few budgets of a step and for chunks of one size. Around the
best deployments the simulation tries budgets between these, and the policy `slack`, with which a chunk is as long as
the slack of those that decode allows. Instances need their step times for that, so it is tried where these are
calibrated (`deploy.plan_serving` gives them to the instances).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from tandem.placement.search.best_first import EvaluatedDeployment
from tandem.placement.search.candidate import CandidateDeployment
from tandem.placement.search.kinds import BUDGET_FACTORS, InstanceKind, with_budget, with_slack
from tandem.placement.search.problem import Problem

_NUM_WITH_SLACK = 2  # variants
_NUM_WITH_BUDGETS = 2  # deployments of which there are variants,
_CLOSE = 0.9  # with at least this share of the best goodput


def variants_of(problem: Problem, candidates: Sequence[EvaluatedDeployment]) -> list[EvaluatedDeployment]:
    """Of the first candidates that have colocated instances with chunks; `candidates` begin with the best one."""
    slack = partial(with_slack, calibrations=problem.cluster.calibrations)
    variants = _variants(candidates, [slack])[:_NUM_WITH_SLACK]
    least = _CLOSE * _goodput(candidates[0])
    close = [candidate for candidate in candidates if _goodput(candidate) >= least]
    budgets = [partial(with_budget, factor=factor) for factor in BUDGET_FACTORS]
    known = {candidate.deployment for candidate in candidates}
    variants += _variants(close, budgets)[: _NUM_WITH_BUDGETS * len(budgets)]
    return [variant for variant in variants if variant.deployment not in known]


def _goodput(candidate: EvaluatedDeployment) -> float:
    return candidate.predicted if candidate.goodput is None else candidate.goodput


def _variants(
    candidates: Sequence[EvaluatedDeployment], changes: Sequence[Callable[[InstanceKind], InstanceKind]]
) -> list[EvaluatedDeployment]:
    """All unlike."""
    found: dict[CandidateDeployment, EvaluatedDeployment] = {}
    for candidate in candidates:
        deployment = candidate.deployment
        for change in changes:
            groups = tuple(replace(group, kind=change(group.kind)) for group in deployment.groups)
            if groups != deployment.groups:
                variant = replace(deployment, groups=groups)
                found.setdefault(variant, replace(candidate, deployment=variant))
    return list(found.values())
