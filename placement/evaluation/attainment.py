"""Attainment: the share of each class's requests that met both targets in steady state."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from tandem.core.plan import ExpectedClass, ExpectedWindow, Quantiles
from tandem.core.slo import SloClass
from tandem.placement.evaluation.steady_state import Interval, is_drifting, share_interval, warm_up_length
from tandem.placement.simulator.result import SimulationResult
from tandem.placement.workload.requests import Floats, RequestStream
from tandem.placement.workload.windows import Window

_LOST_USE = 4.0  # latency, in units of its target, of a request that never finished; larger values are clipped to it
MAX_TAIL = 0.2
"""The most requests that are left out at the end, as a share."""


@dataclass(frozen=True, slots=True)
class ClassEvaluation:
    """Results of one class. `requests` counts the requests in steady state. `attainment` is the share that met both
    targets, 1 for a class without requests; `attainment_ci` is its 95 % interval. Quantiles are over the requests that
    have the latency, NaN if none has.
    """

    slo: SloClass
    requests: int
    attainment: float
    attainment_ci: Interval
    ttft_attainment: float
    tpot_attainment: float
    ttft_s: Quantiles
    tpot_s: Quantiles

    @property
    def margin(self) -> float:
        """Attainment minus the required attainment."""
        return self.attainment - self.slo.attainment

    def expected(self) -> ExpectedClass:
        """The result in the form of a plan."""
        return ExpectedClass(
            slo=self.slo,
            attainment=self.attainment,
            attainment_ci=self.attainment_ci,
            ttft_s=self.ttft_s,
            tpot_s=self.tpot_s,
        )


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The first `warm_up` and the last `tail` requests are left out. `stable`: no queue grows over the run; a longer
    unstable run would miss its targets, whatever its attainment is now. `long_enough`: arrivals lasted at least three
    times the 90th percentile of the time in the system; otherwise a steady state needs more requests. `windows`: see
    `evaluate_windows`. `met`: whether each request met its targets, where whoever simulated has kept that."""

    classes: tuple[ClassEvaluation, ...]
    warm_up: int
    tail: int
    stable: bool
    long_enough: bool
    windows: tuple["Evaluation", ...] = ()
    met: npt.NDArray[np.bool_] | None = field(default=None, compare=False, repr=False)

    @property
    def meets(self) -> bool:
        return self.stable and self.margin >= 0

    @property
    def margin(self) -> float:
        """The smallest margin of all classes."""
        return min(result.margin for result in self.classes)


def evaluate(result: SimulationResult, classes: Sequence[SloClass], *, transient: bool = False) -> Evaluation:
    """The steady-state results of a run. `transient`: all requests count, from the empty start to the end, as DistServe
    measures.

    Left out: at the start, the warm-up by MSER-5, at least the arrivals within the 90th percentile of the time in the
    system (batches still fill), at most half of the requests. At the end, the requests that no later arrivals share
    batches with, at most a fifth. In a run that was stopped early, requests with time left until their deadline.
    Refused and unfinished requests count as missed.

    The requests that are left out do not depend on the targets, and growth is tested for each latency on its own. So
    for a run in which all requests finished, looser targets never turn `meets` to false.
    """
    requests = result.requests
    decided = _decided(result, classes)
    counted = decided
    warm_up = tail = 0
    long_enough = stable = True
    if not transient and decided.any():
        stay_s = _time_in_system(result)[decided]
        p50_s, p90_s = np.quantile(stay_s, (0.5, 0.9))
        warm_up = _warm_up(requests, _slowness(result)[decided], float(p90_s))
        tail = 0 if result.stopped_early else _tail(requests, float(p50_s))
        position = np.arange(len(requests))
        counted = decided & (position >= warm_up) & (position < len(requests) - tail)
        long_enough = bool(requests.duration_s >= 3 * p90_s)
        stable = not any(is_drifting(series[counted & ~np.isnan(series)]) for series in _budget_uses(result, classes))
    return Evaluation(
        classes=_evaluate_classes(result, classes, counted),
        warm_up=warm_up,
        tail=tail,
        stable=stable and (transient or not result.stopped_early),
        long_enough=long_enough,
    )


def evaluate_windows(
    result: SimulationResult, classes: Sequence[SloClass], windows: Sequence[Window], cover: float
) -> Evaluation:
    """The results of a run of the windows of a trace, one after the other: those of the window that decides, with all
    windows in `windows`. The windows are sorted, the best first; the one with which they have the share `cover` of the
    time decides. So the targets are met if they are met in windows that have this share of the time.

    A window has no steady state of its own to be searched for: its bursts are part of it. Left out is what arrives
    within its 90th percentile of the time in the system, when the requests of the window before are still there, at
    most half; at the end of the last window, as by `evaluate`. A window in which a run was stopped misses its targets.
    """
    evaluations = [evaluate_window(result, classes, window) for window in windows]
    return replace(evaluations[_deciding(evaluations, windows, cover)], windows=tuple(evaluations))


def evaluate_window(result: SimulationResult, classes: Sequence[SloClass], window: Window) -> Evaluation:
    """See `evaluate_windows`. Once all requests of a window that is not the last have finished, what comes later does
    not change its results."""
    requests, decided, stay_s = result.requests, _decided(result, classes), _time_in_system(result)
    first, last = window.rows
    rows = np.zeros(len(requests), dtype=np.bool_)
    rows[first:last] = decided[first:last]
    warm_up = tail = 0
    long_enough = True
    if rows.any():
        arrival_s = requests.arrival_s[first:last]
        p50_s, p90_s = np.quantile(stay_s[rows], (0.5, 0.9))
        warm_up = min(int(np.searchsorted(arrival_s, arrival_s[0] + p90_s)), (last - first) // 2)
        if last == len(requests) and not result.stopped_early:
            tail = min(_tail(requests, float(p50_s)), int(MAX_TAIL * (last - first)))
        long_enough = bool(arrival_s[-1] - arrival_s[0] >= 3 * p90_s)
        rows[first : first + warm_up] = False
        rows[last - tail : last] = False
    drifting = any(is_drifting(series[rows & ~np.isnan(series)]) for series in _budget_uses(result, classes))
    return Evaluation(
        classes=_evaluate_classes(result, classes, rows),
        warm_up=first + warm_up,
        tail=len(requests) - last + tail,
        stable=not drifting and bool(decided[first:last].all()),
        long_enough=long_enough,
    )


def expected_windows(windows: Sequence[Window], evaluation: Evaluation) -> tuple[ExpectedWindow, ...]:
    """The results of `evaluate_windows` in the form of a plan."""
    expected = []
    for window, of_window in zip(windows, evaluation.windows, strict=True):
        worst = min(of_window.classes, key=lambda of_class: of_class.margin)
        expected.append(
            ExpectedWindow(
                begin_s=window.begin_s,
                end_s=window.end_s,
                time_share=window.time_share,
                rate=window.rate,
                prompt_tokens=window.prompt_tokens,
                output_tokens=window.output_tokens,
                repeated_share=window.repeated_share,
                attainment=worst.attainment,
                attainment_ci=worst.attainment_ci,
                meets=of_window.meets,
            )
        )
    return tuple(expected)


def deciding_window(windows: Sequence[Window], evaluation: Evaluation) -> Window:
    """The window whose results `evaluation`, of `evaluate_windows`, has."""
    of_windows = [replace(of_window, windows=evaluation.windows) for of_window in evaluation.windows]
    return windows[of_windows.index(evaluation)]


def _deciding(evaluations: Sequence[Evaluation], windows: Sequence[Window], cover: float) -> int:
    order = sorted(range(len(windows)), key=lambda i: (evaluations[i].meets, evaluations[i].margin), reverse=True)
    covered = np.cumsum([windows[i].time_share for i in order])
    return order[min(int(np.searchsorted(covered, cover - 1e-9)), len(order) - 1)]


def _decided(result: SimulationResult, classes: Sequence[SloClass]) -> npt.NDArray[np.bool_]:
    """Requests whose result is known."""
    if not result.stopped_early:
        return np.ones(len(result.requests), dtype=np.bool_)
    decided: npt.NDArray[np.bool_] = deadlines_s(result.requests, classes) <= result.end_s
    return decided


def _evaluate_classes(
    result: SimulationResult, classes: Sequence[SloClass], counted: npt.NDArray[np.bool_]
) -> tuple[ClassEvaluation, ...]:
    use = _budget_use(result, classes)
    return tuple(
        _evaluate_class(slo, result, use, counted & (result.requests.slo_class == index))
        for index, slo in enumerate(classes)
    )


def targets_met(result: SimulationResult, classes: Sequence[SloClass]) -> npt.NDArray[np.bool_]:
    """Whether each request met both targets of its class."""
    met: npt.NDArray[np.bool_] = _budget_use(result, classes) <= 1.0
    return met


def deadlines_s(requests: RequestStream, classes: Sequence[SloClass]) -> Floats:
    """The latest finish of each request that meets both targets of its class."""
    ttft_s = np.array([slo.ttft_s for slo in classes])[requests.slo_class]
    tpot_s = np.array([slo.tpot_s for slo in classes])[requests.slo_class]
    latest: Floats = requests.arrival_s + ttft_s + (requests.output_tokens - 1) * tpot_s
    return latest


def _budget_uses(result: SimulationResult, classes: Sequence[SloClass]) -> tuple[Floats, Floats]:
    """TTFT and TPOT, each divided by its target; at least `_LOST_USE` for an unfinished request. A response of one
    token has no TPOT: NaN."""
    ttft_target = np.array([slo.ttft_s for slo in classes])[result.requests.slo_class]
    tpot_target = np.array([slo.tpot_s for slo in classes])[result.requests.slo_class]
    return _with_lost(result, result.ttft_s / ttft_target), _with_lost(result, result.tpot_s / tpot_target)


def _budget_use(result: SimulationResult, classes: Sequence[SloClass]) -> Floats:
    """The maximum of both budget uses: at most 1 for a request that met both targets. Finite."""
    use: Floats = np.fmax(*_budget_uses(result, classes))
    return use


def _slowness(result: SimulationResult) -> Floats:
    """The maximum of TTFT and TPOT, each divided by its 90th percentile in the run. Finite."""
    parts = []
    for values in (result.ttft_s, result.tpot_s):
        known = values[~np.isnan(values)]
        p90_s = float(np.quantile(known, 0.9)) if len(known) else 0.0
        parts.append(_with_lost(result, values / (p90_s or 1.0)))
    slowness: Floats = np.fmax(*parts)
    return slowness


def _with_lost(result: SimulationResult, use: Floats) -> Floats:
    finite: Floats = np.where(result.finished, use, np.fmax(use, _LOST_USE))
    return finite


def _time_in_system(result: SimulationResult) -> Floats:
    """Seconds from arrival to finish or refusal; to the end of the run for requests that still ran."""
    ended_s = result.ended_s
    stay_s: Floats = np.where(np.isnan(ended_s), result.end_s, ended_s) - result.requests.arrival_s
    return stay_s


def _warm_up(requests: RequestStream, slowness: Floats, fill_s: float) -> int:
    filled = int(np.searchsorted(requests.arrival_s, requests.arrival_s[0] + fill_s))
    return min(max(warm_up_length(np.minimum(slowness, _LOST_USE)), filled), len(requests) // 2)


def _tail(requests: RequestStream, stay_s: float) -> int:
    late = len(requests) - int(np.searchsorted(requests.arrival_s, requests.arrival_s[-1] - stay_s, side="right"))
    return min(late, int(MAX_TAIL * len(requests)))


def _evaluate_class(
    slo: SloClass, result: SimulationResult, use: Floats, counted: npt.NDArray[np.bool_]
) -> ClassEvaluation:
    ttft_s, tpot_s = result.ttft_s[counted], result.tpot_s[counted]
    met = use[counted] <= 1.0
    ttft_met = ttft_s <= slo.ttft_s  # false for NaN: no first token
    tpot_met = result.finished[counted] & ~(tpot_s > slo.tpot_s)  # true for NaN: a response of one token
    return ClassEvaluation(
        slo=slo,
        requests=len(met),
        attainment=_share(met),
        attainment_ci=share_interval(met, use[counted], slo.attainment),
        ttft_attainment=_share(ttft_met),
        tpot_attainment=_share(tpot_met),
        ttft_s=_quantiles(ttft_s),
        tpot_s=_quantiles(tpot_s),
    )


def _share(hits: npt.NDArray[np.bool_]) -> float:
    return float(hits.mean()) if len(hits) else 1.0


def _quantiles(values: Floats) -> Quantiles:
    """Quantiles of the values that are not NaN; NaN if all are."""
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return Quantiles(mean=np.nan, p50=np.nan, p90=np.nan, p99=np.nan)
    p50, p90, p99 = np.quantile(values, (0.5, 0.9, 0.99))
    return Quantiles(mean=float(values.mean()), p50=float(p50), p90=float(p90), p99=float(p99))
