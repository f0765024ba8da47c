"""Removes instances that a deployment does not need, so that their devices are free for other uses."""

from collections.abc import Iterator
from dataclasses import replace

from tandem.placement.search.best_first import EvaluatedDeployment
from tandem.placement.search.candidate import CandidateDeployment, InstanceGroup
from tandem.placement.search.space import SearchSpace
from tandem.placement.search.trial import MAX_TRIAL_INSTANCES, simulate_at


def trimmed(space: SearchSpace, evaluated: EvaluatedDeployment) -> EvaluatedDeployment:
    """The same goodput with as few instances as the prediction and, for small deployments, a simulation allow."""
    goodput = evaluated.goodput or 0.0
    for deployment in _smaller(evaluated.deployment):
        predicted = space.predictor.goodput(deployment)
        if predicted < goodput:
            continue
        is_large = deployment.num_instances > MAX_TRIAL_INSTANCES
        if is_large or simulate_at(space.problem, deployment, goodput)[1].meets:
            return trimmed(space, replace(evaluated, deployment=deployment, predicted=predicted))
    return evaluated


def _smaller(deployment: CandidateDeployment) -> Iterator[CandidateDeployment]:
    """One instance less in a group (in each unit), groups of large instances first."""
    step = max(1, deployment.units)
    for index, group in sorted(enumerate(deployment.groups), key=lambda item: -item[1].kind.num_devices):
        if group.instances > step:
            less = InstanceGroup(group.kind, group.instances - step)
            yield replace(deployment, groups=(*deployment.groups[:index], less, *deployment.groups[index + 1 :]))
