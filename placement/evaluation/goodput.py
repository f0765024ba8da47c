"""Goodput: the highest rate of requests at which every SLO class keeps its attainment in steady state."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from tandem.core.slo import SloClass
from tandem.placement.evaluation.attainment import MAX_TAIL, Evaluation, deadlines_s, evaluate, evaluate_window
from tandem.placement.simulator.result import SimulationResult
from tandem.placement.simulator.run import Progress
from tandem.placement.workload.requests import RequestStream
from tandem.placement.workload.windows import Window

_FACTOR = 2.0
_MAX_DOUBLINGS = 24


StopWhen = Callable[[Progress], bool]
SimulateRequests = Callable[[RequestStream, StopWhen], SimulationResult]
"""Simulates a deployment on a stream of requests; stops when the predicate is true."""


def find_goodput(
    run: SimulateRequests,
    requests: RequestStream,
    classes: Sequence[SloClass],
    *,
    guess: float,
    tolerance: float = 0.02,
    transient: bool = False,
) -> float:
    """The highest tested rate that meets every class, in requests per second of the deployment; 0 if no rate does.

    Doubles or halves the rate from `guess` until it is bracketed, then narrows the bracket to a ratio of 1 +
    `tolerance`. All rates use the same requests with scaled arrivals, so two rates, and two deployments, are compared
    on common random numbers. Assumes that more load never helps. `transient`: see `evaluate`.
    """
    assert guess > 0
    assert tolerance > 0
    evaluated: dict[float, Evaluation] = {}

    def meets(rate: float) -> bool:
        stream = requests.scaled_to(rate)
        evaluated[rate] = evaluate(run(stream, stop_when_lost(stream, classes)), classes, transient=transient)
        return evaluated[rate].meets

    low, high = _bracket(meets, guess)
    while low > 0 and high / low > 1 + tolerance:
        middle = _next_rate(low, high, evaluated[low].margin, evaluated[high].margin, tolerance)
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low


def stop_when_lost(requests: RequestStream, classes: Sequence[SloClass]) -> StopWhen:
    """True once at least one class can no longer keep its attainment.

    A request that meets its targets finishes by its deadline: its TTFT target plus its TPOT target for each further
    token. The number of passed deadlines minus the number of finished requests is a lower bound on the misses, and so
    is the number of refused requests. If one of them exceeds the misses that all classes allow together, at least one
    class has failed.
    """
    deadline_s = np.sort(deadlines_s(requests, classes))
    counts = np.bincount(requests.slo_class, minlength=len(classes))
    allowed_misses = sum((1 - slo.attainment) * int(count) for slo, count in zip(classes, counts, strict=True))

    def is_lost(progress: Progress) -> bool:
        deadlines_passed = int(np.searchsorted(deadline_s, progress.now_s))
        return max(deadlines_passed - progress.finished, progress.refused) > allowed_misses

    return is_lost


def stop_when_windows_lost(
    requests: RequestStream, classes: Sequence[SloClass], windows: Sequence[Window], cover: float
) -> StopWhen:
    """True once windows are lost that have more than the share 1 - `cover` of the time (see `evaluate_windows`).

    A window is lost when one class missed more deadlines there than its attainment allows of all its requests in the
    window. Only requests count that `evaluate_windows` never leaves out: those of the second half, and of the last
    window not the last fifth. When all requests of a window but the last have ended, its evaluation decides.
    """
    deadline_s = deadlines_s(requests, classes) + 1e-9
    required = np.array([slo.attainment for slo in classes])
    certain, allowed_misses = [], []
    for window in windows:
        first, last = window.rows
        end = last - int(MAX_TAIL * (last - first)) if last == len(requests) else last
        certain.append(slice(first + (last - first) // 2, end))
        allowed_misses.append((1 - required) * np.bincount(requests.slo_class[first:last], minlength=len(classes)))
    is_open = [True] * len(windows)
    lost_share = 0.0

    def is_lost(progress: Progress) -> bool:
        nonlocal lost_share
        for index, rows in enumerate(certain):
            if not is_open[index] or requests.arrival_s[rows.start] > progress.now_s:
                continue
            passed = deadline_s[rows] <= progress.now_s
            missed = passed & ~(progress.finished_s[rows] <= deadline_s[rows])  # NaN: not finished
            missed |= ~np.isnan(progress.refused_s[rows])
            misses = np.bincount(requests.slo_class[rows][missed], minlength=len(classes))
            first, last = windows[index].rows
            if np.any(misses > allowed_misses[index] + 1e-9):
                lost_share += windows[index].time_share
                is_open[index] = False
            elif last < len(requests) and not _is_running(progress, first, last):
                is_open[index] = False
                if not evaluate_window(_so_far(requests, progress), classes, windows[index]).meets:
                    lost_share += windows[index].time_share
        return lost_share > 1 - cover + 1e-9

    return is_lost


def _is_running(progress: Progress, first: int, last: int) -> bool:
    """Whether one of these requests has not ended."""
    return bool((np.isnan(progress.finished_s[first:last]) & np.isnan(progress.refused_s[first:last])).any())


def _so_far(requests: RequestStream, progress: Progress) -> SimulationResult:
    ones = np.ones(len(requests), dtype=np.int64)
    return SimulationResult(requests, progress.stamps, ones, 0 * ones, progress.now_s, (), refused_s=progress.refused_s)


def _bracket(meets: Callable[[float], bool], guess: float) -> tuple[float, float]:
    """(a rate that meets, a rate that does not), adjacent in a series of doublings; (0, x) if no rate meets."""
    if meets(guess):
        low = guess
        for _ in range(_MAX_DOUBLINGS):
            if not meets(low * _FACTOR):
                return low, low * _FACTOR
            low *= _FACTOR
        return low, low  # no rate is too high
    high = guess
    for _ in range(_MAX_DOUBLINGS):
        if meets(high / _FACTOR):
            return high / _FACTOR, high
        high /= _FACTOR
    return 0.0, high


def _next_rate(low: float, high: float, low_margin: float, high_margin: float, tolerance: float) -> float:
    """The zero of a straight line through the margins, kept away from both ends. An unstable run can have a positive
    margin; then the geometric middle."""
    crossing = low_margin / (low_margin - high_margin) if high_margin < 0 else 0.5
    part = min(0.75, max(0.25, crossing))
    # One more simulation closes a bracket that is nearly closed; halving would take several.
    return low * max(math.pow(high / low, part), min(1 + tolerance / 2, math.sqrt(high / low)))
