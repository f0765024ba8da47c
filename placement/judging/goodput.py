"""Goodput: the highest rate of requests at which every SLO class keeps its attainment, in steady state."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tandem.core.slo import SloClass
from tandem.placement.judging.judgement import ClassJudgement, Judgement, deadlines_s, judge
from tandem.placement.judging.steady_state import Interval
from tandem.placement.simulator.result import SimulationResult
from tandem.placement.simulator.run import Progress
from tandem.placement.workload.requests import RequestStream

__all__ = ["ClassJudgement", "Evaluation", "Goodput", "Judgement", "goodput_at", "judge", "stop_when_lost"]

_FACTOR = 2.0
_MAX_DOUBLINGS = 24


StopWhen = Callable[[Progress], bool]
Run = Callable[[RequestStream, StopWhen], SimulationResult]
"""Simulates a deployment on some requests, and gives up when the predicate says so."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    rate: float
    judgement: Judgement


@dataclass(frozen=True, slots=True)
class Goodput:
    """`rate`: the highest rate tried, in requests per second of the whole deployment, that met every class, and at
    which nothing lower failed; 0 if none did. `ci`: between which rates the attainment's 95 % interval holds its
    target. `evaluations` ascend in rate."""

    rate: float
    ci: Interval
    evaluations: tuple[Evaluation, ...]

    @property
    def at_rate(self) -> Judgement | None:
        """What the run at `rate` came to; None if no rate met the objectives."""
        return next((one.judgement for one in self.evaluations if one.rate == self.rate), None)


def goodput_at(
    run: Run,
    requests: RequestStream,
    classes: Sequence[SloClass],
    *,
    guess: float,
    tolerance: float = 0.02,
    transient: bool = False,
) -> Goodput:
    """Doubles or halves the rate from `guess` until it is bracketed, then closes in to a ratio of 1 + `tolerance`.

    Each trial is the same requests with their arrivals stretched, so that two rates, and two deployments, differ by
    what they are and not by luck. That more load never helps is taken for granted. `transient`: see `judge`.
    """
    assert guess > 0
    assert tolerance > 0
    tried: dict[float, Judgement] = {}

    def meets(rate: float) -> bool:
        stream = requests.scaled_to(rate)
        tried[rate] = judge(run(stream, stop_when_lost(stream, classes)), classes, transient=transient)
        return tried[rate].meets

    low, high = _bracket(meets, guess)
    while low > 0 and high / low > 1 + tolerance:
        middle = _next_rate(low, high, tried[low].margin, tried[high].margin, tolerance)
        low, high = (middle, high) if meets(middle) else (low, middle)
    evaluations = tuple(Evaluation(rate, tried[rate]) for rate in sorted(tried))
    return Goodput(low, _rate_interval(evaluations, low, high), evaluations)


def stop_when_lost(requests: RequestStream, classes: Sequence[SloClass]) -> StopWhen:
    """True once some class can no longer keep its attainment, whatever comes.

    A request that met its targets has finished by its deadline: its TTFT target, then its TPOT target for each further
    token. So at least as many have missed as deadlines have passed beyond the requests finished; when these are more
    than all classes together may miss of the whole stream, one of them has failed.
    """
    deadline_s = np.sort(deadlines_s(requests, classes))
    counts = np.bincount(requests.slo_class, minlength=len(classes))
    may_miss = sum((1 - slo.attainment) * int(count) for slo, count in zip(classes, counts, strict=True))

    def is_lost(progress: Progress) -> bool:
        deadlines_passed = int(np.searchsorted(deadline_s, progress.now_s))
        return deadlines_passed - progress.finished > may_miss

    return is_lost


def _bracket(meets: Callable[[float], bool], guess: float) -> tuple[float, float]:
    """(a rate that meets, one that does not), neighbours in a series of doublings; (0, x) if none meets."""
    if meets(guess):
        low = guess
        for _ in range(_MAX_DOUBLINGS):
            if not meets(low * _FACTOR):
                return low, low * _FACTOR
            low *= _FACTOR
        return low, low  # nothing that can be asked for is too much
    high = guess
    for _ in range(_MAX_DOUBLINGS):
        if meets(high / _FACTOR):
            return high / _FACTOR, high
        high /= _FACTOR
    return 0.0, high


def _next_rate(low: float, high: float, low_margin: float, high_margin: float, tolerance: float) -> float:
    """Where a straight line through the margins crosses zero, kept off the ends. An unstable run may have a margin that
    is positive still: then the middle."""
    crossing = low_margin / (low_margin - high_margin) if high_margin < 0 else 0.5
    part = min(0.75, max(0.25, crossing))
    # A bracket that is nearly closed is closed by one more trial, not by a series of halves.
    return low * max(math.pow(high / low, part), min(1 + tolerance / 2, math.sqrt(high / low)))


def _rate_interval(evaluations: Sequence[Evaluation], low: float, high: float) -> Interval:
    """The rates at which the interval's lower, and its upper, end crosses the attainment asked for."""
    if low == 0:
        return 0.0, high

    def surplus(one: Evaluation, end: int) -> float:
        if one.rate > low and not one.judgement.stable:
            return -1.0
        return min(judged.attainment_ci[end] - judged.slo.attainment for judged in one.judgement.classes)

    rates = [one.rate for one in evaluations]
    lower = _crossing(rates, [surplus(one, 0) for one in evaluations])
    upper = _crossing(rates, [surplus(one, 1) for one in evaluations])
    return min(low, lower), max(low, upper)


def _crossing(rates: Sequence[float], surplus: Sequence[float]) -> float:
    """The first rate at which `surplus` falls below zero, by straight lines between the rates that were tried."""
    previous_rate, previous = 0.0, 1.0
    for rate, value in zip(rates, surplus, strict=True):
        if value < 0:
            return previous_rate + (rate - previous_rate) * previous / (previous - value)
        previous_rate, previous = rate, value
    return previous_rate
