"""Whether a run met its objectives: the share of each class's requests that kept both targets, in steady state."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tandem.core.plan import ExpectedClass, Quantiles
from tandem.core.slo import SloClass
from tandem.core.timeline import Stage
from tandem.placement.judging.steady_state import Interval, is_drifting, share_interval, warm_up_length
from tandem.placement.simulator.result import SimulationResult
from tandem.placement.workload.requests import Floats, RequestStream

_LOST_USE = 4.0  # a request that never ended counts like one that took this much of its budget; more tells no more
_MAX_TAIL = 0.2


@dataclass(frozen=True, slots=True)
class ClassJudgement:
    """Of `requests` judged. `attainment` is joint: a request counts if it kept both targets. `attainment_ci` is a 95 %
    interval. Quantiles are of requests that have the latency, NaN if none has. A class without a request cannot miss.
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
        """Attainment beyond what the class asks for; negative if it falls short."""
        return self.attainment - self.slo.attainment

    def expected(self) -> ExpectedClass:
        """The same, as a plan states it."""
        return ExpectedClass(
            slo=self.slo,
            attainment=self.attainment,
            attainment_ci=self.attainment_ci,
            ttft_s=self.ttft_s,
            tpot_s=self.tpot_s,
        )


@dataclass(frozen=True, slots=True)
class Judgement:
    """`warm_up` requests were left out in front, `tail` behind. `stable`: no queue grows from end to end; an unstable
    run would miss its targets if only it lasted longer, whatever its attainment. `long_enough`: arrivals lasted at
    least three times as long as nine of ten requests stay; else more requests are needed for a steady state."""

    classes: tuple[ClassJudgement, ...]
    warm_up: int
    tail: int
    stable: bool
    long_enough: bool

    @property
    def meets(self) -> bool:
        return self.stable and self.margin >= 0

    @property
    def margin(self) -> float:
        """Of the class that has least to spare."""
        return min(judged.margin for judged in self.classes)


def judge(result: SimulationResult, classes: Sequence[SloClass], *, transient: bool = False) -> Judgement:
    """What the run says of steady state. `transient`: every request counts, from the empty start to the last drop, as
    DistServe measures it.

    Left out: in front, what MSER-5 finds, and at least the requests that came before nine of ten of the first ones
    could be gone, while batches still fill; at most half. Behind, those who came so late that nobody came after them to
    share their batches; at most a fifth. In a run that was stopped early, those who would have had time left.
    A request that was refused or never ended missed its targets.

    What is left out does not depend on the targets, and each latency is asked by itself whether it grows. So, of one
    run in which every request ended, looser targets never make `meets` false.
    """
    requests = result.requests
    use = _budget_use(result, classes)
    within = _had_time(result, classes) if result.stopped_early else np.ones(len(requests), dtype=np.bool_)
    chosen = within
    warm_up = tail = 0
    long_enough = stable = True
    if not transient and within.any():
        stay_s = _time_in_system(result)[within]
        p50_s, p90_s = np.quantile(stay_s, (0.5, 0.9))
        warm_up = _warm_up(requests, _slowness(result)[within], float(p90_s))
        tail = 0 if result.stopped_early else _tail(requests, float(p50_s))
        position = np.arange(len(requests))
        chosen = within & (position >= warm_up) & (position < len(requests) - tail)
        long_enough = bool(requests.duration_s >= 3 * p90_s)
        stable = not any(is_drifting(series[chosen & ~np.isnan(series)]) for series in _budget_uses(result, classes))
    return Judgement(
        classes=tuple(
            _judge_class(slo, result, use, chosen & (requests.slo_class == index)) for index, slo in enumerate(classes)
        ),
        warm_up=warm_up,
        tail=tail,
        stable=stable and (transient or not result.stopped_early),
        long_enough=long_enough,
    )


def deadlines_s(requests: RequestStream, classes: Sequence[SloClass]) -> Floats:
    """When each request has to be finished to have met both targets of its class."""
    ttft_s = np.array([slo.ttft_s for slo in classes])[requests.slo_class]
    tpot_s = np.array([slo.tpot_s for slo in classes])[requests.slo_class]
    latest: Floats = requests.arrival_s + ttft_s + (requests.output_tokens - 1) * tpot_s
    return latest


def _budget_uses(result: SimulationResult, classes: Sequence[SloClass]) -> tuple[Floats, Floats]:
    """TTFT and TPOT, each in units of its target, of a lost request at least `_LOST_USE`. An answer of one token has no
    TPOT: NaN."""
    ttft_target = np.array([slo.ttft_s for slo in classes])[result.requests.slo_class]
    tpot_target = np.array([slo.tpot_s for slo in classes])[result.requests.slo_class]
    return _with_lost(result, result.ttft_s / ttft_target), _with_lost(result, result.tpot_s / tpot_target)


def _budget_use(result: SimulationResult, classes: Sequence[SloClass]) -> Floats:
    """The larger of the two: at most 1 for a request that met both targets. Finite."""
    use: Floats = np.fmax(*_budget_uses(result, classes))
    return use


def _slowness(result: SimulationResult) -> Floats:
    """The larger of TTFT and TPOT, each in units of what nine of ten requests of the run stay below. Finite."""
    parts = []
    for values in (result.ttft_s, result.tpot_s):
        known = values[~np.isnan(values)]
        usual = float(np.quantile(known, 0.9)) if len(known) else 0.0
        parts.append(_with_lost(result, values / (usual or 1.0)))
    slowness: Floats = np.fmax(*parts)
    return slowness


def _with_lost(result: SimulationResult, use: Floats) -> Floats:
    finite: Floats = np.where(result.finished, use, np.fmax(use, _LOST_USE))
    return finite


def _had_time(result: SimulationResult, classes: Sequence[SloClass]) -> npt.NDArray[np.bool_]:
    had_time: npt.NDArray[np.bool_] = deadlines_s(result.requests, classes) <= result.end_s
    return had_time


def _time_in_system(result: SimulationResult) -> Floats:
    """Of an unfinished one: until the end."""
    until_s = np.where(result.finished, result.stage(Stage.FINISHED), result.end_s)
    stay_s: Floats = until_s - result.requests.arrival_s
    return stay_s


def _warm_up(requests: RequestStream, slowness: Floats, fill_s: float) -> int:
    filled = int(np.searchsorted(requests.arrival_s, requests.arrival_s[0] + fill_s))
    return min(max(warm_up_length(np.minimum(slowness, _LOST_USE)), filled), len(requests) // 2)


def _tail(requests: RequestStream, stay_s: float) -> int:
    late = len(requests) - int(np.searchsorted(requests.arrival_s, requests.arrival_s[-1] - stay_s, side="right"))
    return min(late, int(_MAX_TAIL * len(requests)))


def _judge_class(slo: SloClass, result: SimulationResult, use: Floats, chosen: npt.NDArray[np.bool_]) -> ClassJudgement:
    ttft_s, tpot_s = result.ttft_s[chosen], result.tpot_s[chosen]
    met = use[chosen] <= 1.0
    finished = result.finished[chosen]
    on_time = ttft_s <= slo.ttft_s  # NaN, no first token, is not
    steady = finished & ~(tpot_s > slo.tpot_s)  # NaN, an answer of one token, is
    return ClassJudgement(
        slo=slo,
        requests=len(met),
        attainment=_share(met),
        attainment_ci=share_interval(met, np.minimum(use[chosen], _LOST_USE)),
        ttft_attainment=_share(on_time),
        tpot_attainment=_share(steady),
        ttft_s=quantiles(ttft_s),
        tpot_s=quantiles(tpot_s),
    )


def _share(hits: npt.NDArray[np.bool_]) -> float:
    return float(hits.mean()) if len(hits) else 1.0


def quantiles(values: Floats) -> Quantiles:
    """Of the values that are not NaN; NaN if there are none."""
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return Quantiles(mean=np.nan, p50=np.nan, p90=np.nan, p99=np.nan)
    p50, p90, p99 = np.quantile(values, (0.5, 0.9, 0.99))
    return Quantiles(mean=float(values.mean()), p50=float(p50), p90=float(p90), p99=float(p99))
