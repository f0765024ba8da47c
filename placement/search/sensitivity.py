"""Sensitivity of the plan: the same deployment with other rates, lengths, targets and step times.

Attainment comes from simulations. Goodput is the measured goodput times the ratio of the predictions for the changed
and the original problem.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from tandem.core.cost_model import CostModel, StepCost, StepLoad, staged
from tandem.placement.evaluation.attainment import Evaluation
from tandem.placement.evidence import SensitivityPoint
from tandem.placement.search.candidate import CandidateDeployment, InstanceGroup
from tandem.placement.search.chosen_deployment import MeasuredGoodput
from tandem.placement.search.group_attainment import group_attainment
from tandem.placement.search.limits import limit_of
from tandem.placement.search.mapper import Mapper, SerialMapper
from tandem.placement.search.predict import Predictor
from tandem.placement.search.problem import Problem
from tandem.placement.search.trial import evaluate_at
from tandem.placement.workload.requests import Ints, RequestStream

_FACTORS = (0.75, 1.5)
_MAX_RATE_FACTOR = 2.0


@dataclass(frozen=True, slots=True)
class SlowerCost:
    """Another cost model with all times multiplied by `factor`."""

    cost: CostModel
    factor: float

    @property
    def num_stages(self) -> int:
        known = staged(self.cost)
        return 1 if known is None else known.num_stages

    def step(self, load: StepLoad) -> StepCost:
        return self._slower(self.cost.step(load))

    def one_step(self, load: StepLoad) -> StepCost:
        known = staged(self.cost)
        return self.step(load) if known is None else self._slower(known.one_step(load))

    def _slower(self, step: StepCost) -> StepCost:
        terms = {name: time_s * self.factor for name, time_s in step.terms().items()}
        return StepCost(**terms, interval_s=step.interval_s * self.factor)

    def decode_coefficients(self, sequences: int) -> tuple[float, float]:
        base_s, per_kv_token_s = self.cost.decode_coefficients(sequences)
        return base_s * self.factor, per_kv_token_s * self.factor


@dataclass(frozen=True, slots=True)
class Variation:
    """The problem with `axis` (see `SensitivityPoint`) times `factor`."""

    axis: str
    factor: float
    problem: Problem


def sensitivity_of(
    problem: Problem, measured: MeasuredGoodput, rate: float, mapper: Mapper, *, separate_nodes: bool
) -> tuple[SensitivityPoint, ...]:
    """The sensitivity of the deployment of `measured` at `rate`."""
    points = [
        SensitivityPoint("rate", point.rate / rate, attainment=_lowest_attainment(point.evaluation))
        for point in measured.evaluated_rates
        if rate / _MAX_RATE_FACTOR <= point.rate <= rate * _MAX_RATE_FACTOR
    ]
    varied = list(variations(problem))
    evaluate = partial(_evaluate, measured.deployment, separate_nodes, rate)
    (_, unchanged), *results = mapper(evaluate, [Variation("rate", 1.0, problem), *varied])
    for variation, (attainment, predicted) in zip(varied, results, strict=True):
        goodput = measured.goodput * predicted / unchanged if unchanged > 0 else None
        points.append(SensitivityPoint(variation.axis, variation.factor, goodput, attainment))  # type: ignore[arg-type]
    return tuple(points)


def predicted_goodput(problem: Problem, deployment: CandidateDeployment, slowdown: float = 1.0) -> float:
    """The prediction for the deployment with all step times multiplied by `slowdown`."""
    groups = tuple(
        InstanceGroup(replace(group.kind, cost=SlowerCost(group.kind.cost, slowdown)), group.instances)
        for group in deployment.groups
    )
    limits = {group.kind: limit_of(group.kind, problem.classes, problem.computed) for group in groups}
    compute = partial(group_attainment, stream=problem.computed, classes=problem.classes)
    return Predictor(problem, limits, partial(SerialMapper(), compute)).goodput(replace(deployment, groups=groups))


def variations(problem: Problem) -> Iterator[Variation]:
    for factor in _FACTORS:
        for field in ("prompt_tokens", "output_tokens"):
            requests, computed = _longer(problem.requests, field, factor), _longer(problem.computed, field, factor)
            yield Variation(field, factor, replace(problem, requests=requests, computed=computed))
        for axis, target in (("ttft_target", "ttft_s"), ("tpot_target", "tpot_s")):
            classes = tuple(slo.model_copy(update={target: getattr(slo, target) * factor}) for slo in problem.classes)
            yield Variation(axis, factor, replace(problem, classes=classes))


def _longer(stream: RequestStream, field: str, factor: float) -> RequestStream:
    lengths: Ints = np.maximum(1, np.rint(getattr(stream, field) * factor)).astype(np.int64)
    longer = replace(stream, **{field: lengths})  # type: ignore[arg-type]
    return replace(longer, prefix_tokens=np.minimum(longer.prefix_tokens, longer.prompt_tokens))


def _evaluate(
    deployment: CandidateDeployment, separate_nodes: bool, rate: float, variation: Variation
) -> tuple[float, float]:
    """(attainment at `rate`, predicted goodput); without simulation for the unchanged problem."""
    predicted = predicted_goodput(variation.problem, deployment)
    if variation.factor == 1.0:
        return math.nan, predicted
    return _lowest_attainment(evaluate_at(variation.problem, deployment, separate_nodes, rate)), predicted


def _lowest_attainment(evaluation: Evaluation) -> float:
    """Attainment of the class with the smallest margin."""
    return min(evaluation.classes, key=lambda result: result.margin).attainment
