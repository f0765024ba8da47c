"""How much the answer depends on the question: the same fleet under other lengths, targets and speeds.

Attainment comes from simulations, at other rates from those of the verdict. Goodput comes from the quick model of each
phase alone, as a ratio to what that says of the question as asked.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from tandem.core.cost_model import CostModel, StepCost, StepLoad
from tandem.placement.evidence import SensitivityPoint
from tandem.placement.judging.goodput import Judgement
from tandem.placement.search.curves import curve_of
from tandem.placement.search.fleet import Fleet, Pool
from tandem.placement.search.limits import limit_of
from tandem.placement.search.parallel import Mapper, Serial
from tandem.placement.search.predict import Predictor
from tandem.placement.search.problem import Problem
from tandem.placement.search.trial import run
from tandem.placement.search.verdict import Verdict
from tandem.placement.workload.requests import Ints, RequestStream

_FACTORS = (0.75, 1.5)
_FURTHEST_RATE = 2.0


@dataclass(frozen=True, slots=True)
class SlowerCost:
    """Another cost model with all times multiplied."""

    cost: CostModel
    factor: float

    def step(self, load: StepLoad) -> StepCost:
        step = self.cost.step(load)
        terms = {name: time_s * self.factor for name, time_s in step.terms().items()}
        return StepCost(**terms, interval_s=step.interval_s * self.factor)

    def decode_coefficients(self, sequences: int) -> tuple[float, float]:
        base_s, per_kv_token_s = self.cost.decode_coefficients(sequences)
        return base_s * self.factor, per_kv_token_s * self.factor


@dataclass(frozen=True, slots=True)
class _Change:
    axis: str
    factor: float
    problem: Problem


def sensitivity_of(
    problem: Problem, verdict: Verdict, rate: float, mapper: Mapper, *, apart: bool
) -> tuple[SensitivityPoint, ...]:
    """Of the fleet of `verdict`, judged at `rate`."""
    points = [
        SensitivityPoint("rate", one.rate / rate, attainment=_least(one.judgement))
        for one in verdict.evaluations
        if rate / _FURTHEST_RATE <= one.rate <= rate * _FURTHEST_RATE
    ]
    changes = list(_changes(problem))
    asked = predicted(problem, verdict.fleet)
    answers = mapper(partial(_changed, verdict.fleet, apart, rate), changes)
    for change, (attainment, goodput) in zip(changes, answers, strict=True):
        scaled = verdict.goodput * goodput / asked if asked > 0 else None
        points.append(SensitivityPoint(change.axis, change.factor, scaled, attainment))  # type: ignore[arg-type]
    return tuple(points)


def predicted(problem: Problem, fleet: Fleet, slower: float = 1.0) -> float:
    """Goodput of the fleet by each phase alone, all steps `slower` times as long."""
    pools = tuple(
        Pool(replace(pool.kind, cost=SlowerCost(pool.kind.cost, slower)), pool.instances) for pool in fleet.pools
    )
    limits = {pool.kind: limit_of(pool.kind, problem.classes, problem.computed) for pool in pools}
    compute = partial(curve_of, stream=problem.computed, classes=problem.classes)
    return Predictor(problem, limits, partial(Serial(), compute)).goodput(replace(fleet, pools=pools))


def _changes(problem: Problem) -> Iterator[_Change]:
    for factor in _FACTORS:
        for field in ("prompt_tokens", "output_tokens"):
            requests, computed = _longer(problem.requests, field, factor), _longer(problem.computed, field, factor)
            yield _Change(field, factor, replace(problem, requests=requests, computed=computed))
        for axis, target in (("ttft_target", "ttft_s"), ("tpot_target", "tpot_s")):
            classes = tuple(slo.model_copy(update={target: getattr(slo, target) * factor}) for slo in problem.classes)
            yield _Change(axis, factor, replace(problem, classes=classes))


def _longer(stream: RequestStream, field: str, factor: float) -> RequestStream:
    lengths: Ints = np.maximum(1, np.rint(getattr(stream, field) * factor)).astype(np.int64)
    longer = replace(stream, **{field: lengths})  # type: ignore[arg-type]
    return replace(longer, prefix_tokens=np.minimum(longer.prefix_tokens, longer.prompt_tokens))


def _changed(fleet: Fleet, apart: bool, rate: float, change: _Change) -> tuple[float, float]:
    """Attainment at `rate` and predicted goodput."""
    return _least(_judged(change.problem, fleet, apart, rate)), predicted(change.problem, fleet)


def _judged(problem: Problem, fleet: Fleet, apart: bool, rate: float) -> Judgement:
    return run(problem, fleet, rate, apart=apart)[1]


def _least(judgement: Judgement) -> float:
    """Attainment of the class that has least to spare."""
    return min(judgement.classes, key=lambda judged: judged.margin).attainment
