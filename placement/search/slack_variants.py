"""Deployments whose colocated instances spend the slack of those that decode, beside the same ones with fixed chunks.

The search's prediction of colocated instances knows chunks of one size. With the policy `slack` a chunk is as long as
the slack allows, which the simulation shows: it is tried for the best deployments only. Instances need their step times
for it, so it is tried where these are calibrated (`deploy.plan_serving` gives them to the instances).
"""

from collections.abc import Sequence
from dataclasses import replace

from tandem.placement.search.best_first import EvaluatedDeployment
from tandem.placement.search.candidate import CandidateDeployment
from tandem.placement.search.kinds import with_slack
from tandem.placement.search.problem import Problem


def slack_variants(
    problem: Problem, candidates: Sequence[EvaluatedDeployment], count: int
) -> list[EvaluatedDeployment]:
    """Of the first candidates that have colocated instances with chunks; at most `count`, all unlike."""
    calibrated = problem.cluster.calibrations
    variants: dict[CandidateDeployment, EvaluatedDeployment] = {}
    for candidate in candidates:
        deployment = candidate.deployment
        groups = tuple(replace(group, kind=with_slack(group.kind, calibrated)) for group in deployment.groups)
        if groups != deployment.groups and len(variants) < count:
            variant = replace(deployment, groups=groups)
            variants.setdefault(variant, replace(candidate, deployment=variant))
    return list(variants.values())
