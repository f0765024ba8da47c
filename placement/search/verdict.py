"""The chosen fleet in full: goodput with an interval, attainment over rates, latencies, and what bounds its steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from tandem.core.slo import SloClass
from tandem.placement.evidence import AttainmentCurve, AttainmentPoint, LatencySample, PhaseBound
from tandem.placement.judging.goodput import Evaluation, Judgement
from tandem.placement.search.fleet import Fleet
from tandem.placement.search.parallel import Mapper
from tandem.placement.search.problem import Problem
from tandem.placement.search.trial import LADDER_STEP, run
from tandem.placement.simulator.result import InstanceUse, SimulationResult

_AROUND = (0.3, 0.6, 0.8, 0.9, 1 / LADDER_STEP, 1.0, LADDER_STEP, 1.1, 1.2, 1.5)
_MOST_STEPS = 24
_SAMPLE = 2000


@dataclass(frozen=True, slots=True)
class Verdict:
    """Rates and goodput are those of `fleet`, the one that was simulated. `goodput` is 0 if no rate passed."""

    fleet: Fleet
    goodput: float
    goodput_ci: tuple[float, float]
    evaluations: tuple[Evaluation, ...]


@dataclass(frozen=True, slots=True)
class Observation:
    """One run, reduced to what evidence shows of it."""

    judgement: Judgement
    latencies: tuple[LatencySample, ...]
    bounds: tuple[PhaseBound, ...]
    requests: int


def verdict_on(problem: Problem, fleet: Fleet, guess: float, mapper: Mapper, *, apart: bool) -> Verdict:
    """Simulates `fleet` at rates around `guess`, several at a time, then rung by rung until its goodput is between two
    of them."""
    evaluate = partial(_evaluate, partial(_judgement, problem, fleet, apart), mapper)
    tried = evaluate([guess * factor for factor in _AROUND])
    for _ in range(_MOST_STEPS):
        low, high = _bracket(tried)
        if low == 0:
            missing = min(one.rate for one in tried) / LADDER_STEP**4
        elif high == np.inf:
            missing = max(one.rate for one in tried) * LADDER_STEP**2
        elif high / low > LADDER_STEP * 1.01:
            missing = low * LADDER_STEP
        else:
            break
        tried = sorted([*tried, *evaluate([missing])], key=lambda one: one.rate)
    low, high = _bracket(tried)
    return Verdict(fleet, low, _rate_interval(tried, low, high), tuple(tried))


def observe(problem: Problem, fleet: Fleet, apart: bool, rate: float) -> Observation:
    """One run at `rate`."""
    result, judgement = run(problem, fleet, rate, apart=apart, whole=True)
    steady = slice(judgement.warm_up, len(result.requests) - judgement.tail)
    return Observation(
        judgement=judgement,
        latencies=tuple(_latencies(result, steady, slo, index) for index, slo in enumerate(problem.classes)),
        bounds=_bounds(fleet, result),
        requests=len(result.requests),
    )


def curves_of(verdict: Verdict, classes: Sequence[SloClass]) -> tuple[AttainmentCurve, ...]:
    """Attainment of each class over the rates that were simulated."""
    curves = []
    for index, slo in enumerate(classes):
        judged = [(one.rate, one.judgement.classes[index]) for one in verdict.evaluations]
        points = tuple(
            AttainmentPoint(rate, of.attainment, of.attainment_ci, of.ttft_attainment, of.tpot_attainment)
            for rate, of in judged
        )
        knee = max((rate for rate, of in judged if of.margin >= 0), default=None)
        curves.append(AttainmentCurve(slo, points, knee))
    return tuple(curves)


def _evaluate(judge_at: Callable[[float], Judgement], mapper: Mapper, rates: Sequence[float]) -> list[Evaluation]:
    return [Evaluation(rate, judged) for rate, judged in zip(rates, mapper(judge_at, rates), strict=True)]


def _judgement(problem: Problem, fleet: Fleet, apart: bool, rate: float) -> Judgement:
    return run(problem, fleet, rate, apart=apart)[1]


def _bracket(tried: Sequence[Evaluation]) -> tuple[float, float]:
    """The highest rate below which nothing failed, and the lowest that did; 0 and infinity where there is none."""
    high = min((one.rate for one in tried if not one.judgement.meets), default=np.inf)
    return max((one.rate for one in tried if one.rate < high), default=0.0), float(high)


def _rate_interval(tried: Sequence[Evaluation], low: float, high: float) -> tuple[float, float]:
    """Between which rates the 95 % interval of the attainment holds what is asked for."""
    sure = max((one.rate for one in tried if one.rate <= low and _surplus(one, 0) >= 0), default=0.0)
    possible = min((one.rate for one in tried if one.rate >= high and _surplus(one, 1) < 0), default=high)
    return sure, possible


def _surplus(one: Evaluation, end: int) -> float:
    if not one.judgement.stable:
        return -1.0
    return min(judged.attainment_ci[end] - judged.slo.attainment for judged in one.judgement.classes)


def _latencies(result: SimulationResult, steady: slice, slo: SloClass, index: int) -> LatencySample:
    of_class = result.requests.slo_class[steady] == index

    def sample(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, ...]:
        chosen = values[steady][of_class]
        return tuple(chosen[~np.isnan(chosen)][:_SAMPLE].tolist())

    return LatencySample(slo, sample(result.ttft_s), sample(result.tpot_s))


def _bounds(fleet: Fleet, result: SimulationResult) -> tuple[PhaseBound, ...]:
    """Of each pool; instances come in the pools' order."""
    bounds, first = [], {"prefill": 0, "decode": 0, "colocated": 0}
    for pool in fleet.pools:
        role = pool.kind.role
        begin, first[role] = first[role], first[role] + pool.instances
        uses = [use for use in result.instances if use.role == role][begin : begin + pool.instances]
        label = f"{role}, {pool.instances} x {pool.kind.device} {pool.kind.shape}"
        bounds.append(_bound(role, label, uses, result.end_s))
    return tuple(bounds)


def _bound(role: str, label: str, uses: Sequence[InstanceUse], end_s: float) -> PhaseBound:
    terms: dict[str, float] = {}
    for use in uses:
        for name, time_s in use.cost_terms_s.items():
            terms[name] = terms.get(name, 0.0) + time_s
    steps = max(1, sum(use.steps for use in uses))
    tokens = sum(use.prefill_tokens if role == "prefill" else use.decode_tokens for use in uses)
    return PhaseBound(
        role=role,
        label=label,
        cost_terms_s=tuple(terms.items()),
        utilisation=min(1.0, sum(use.busy_s for use in uses) / (len(uses) * end_s)) if end_s > 0 else 0.0,
        kv_peak=max((use.peak_blocks / use.num_blocks for use in uses), default=0.0),
        tokens_per_step=tokens / steps,
    )
