"""How far a cluster's step times have drifted from a calibration that was made of it before.

A virtual machine shares its memory with other machines: the same steps of the same processes may take 1.5 times as long
in one minute as in the next, and twice as long for some seconds. A measurement that is compared with a prediction
should be made while the machine is as fast as it was for the prediction's numbers.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from tandem.core.cost_model import StepLoad
from tandem.placement.costs.calibration import Calibration
from tandem.placement.costs.serving import ServedStep
from tandem.placement.costs.step_fit import CalibratedCost
from tandem.profiling.serving_fit import decode_step_times, prefill_step_times
from tandem.profiling.serving_samples import LoadPeriod, PrefillStep, RequestSample, prefill_steps_of

_WINDOW_S = 2.0
_MIN_BUSY_S = 0.2  # of steps in a window, to judge by
_DISTURBED = 1.3  # times the usual step time; other load on the machine makes it 1.8 or 2


@dataclass(frozen=True, slots=True)
class StepTimeDrift:
    """Step times divided by those of the calibration."""

    prefill: float
    decode: float

    def is_within(self, tolerance: float) -> bool:
        """Whether neither phase differs from the calibration by more than `tolerance`."""
        return abs(self.prefill - 1) <= tolerance and abs(self.decode - 1) <= tolerance


def disturbed_s(requests: Sequence[RequestSample], calibration: Calibration) -> float:
    """Seconds of a run during which its prefill steps took much longer than usual, because other processes had the
    machine. The error of a calibration is far smaller."""
    cost = CalibratedCost(calibration.terms, calibration.serving, contended=1.0)
    measured_s, usual_s = defaultdict[int, float](float), defaultdict[int, float](float)
    for step in prefill_steps_of(requests):
        window = int(step.began_s // _WINDOW_S)
        measured_s[window] += step.duration_s
        usual_s[window] += cost.step(StepLoad.of_prompts(*step.lengths)).total_s
    return _WINDOW_S * sum(
        seconds >= _MIN_BUSY_S and measured_s[window] > _DISTURBED * seconds for window, seconds in usual_s.items()
    )


def drift_in_period(period: LoadPeriod, calibration: Calibration) -> StepTimeDrift:
    """Of a cluster of one worker of each role while both were kept busy."""
    return _drift(period.prefill_steps(), period, calibration)


def drift_in_run(requests: Sequence[RequestSample], calibration: Calibration) -> StepTimeDrift:
    """Of such a cluster while it served these requests."""
    return _drift(prefill_steps_of(requests), LoadPeriod(tuple(requests)), calibration)


def with_drift(calibration: Calibration, drift: StepTimeDrift) -> Calibration:
    """The calibration with this drift applied."""

    def scaled(step: ServedStep, factor: float) -> ServedStep:
        return ServedStep(
            constant_s=factor * step.constant_s,
            factor=factor * step.factor,
            by_batch=tuple((batch, factor * known) for batch, known in step.by_batch),
        )

    serving = calibration.serving
    changed = {
        "prefill_alone": scaled(serving.prefill_alone, drift.prefill),
        "prefill_contended": scaled(serving.prefill_contended, drift.prefill),
        "decode_alone": scaled(serving.decode_alone, drift.decode),
        "decode_contended": scaled(serving.decode_contended, drift.decode),
        "request_admission_cost_s": drift.decode * serving.request_admission_cost_s,
    }
    return calibration.model_copy(update={"serving": serving.model_copy(update=changed)})


def _drift(steps: Sequence[PrefillStep], period: LoadPeriod, calibration: Calibration) -> StepTimeDrift:
    cost, serving = CalibratedCost(calibration.terms), calibration.serving
    prefill, decode = prefill_step_times(cost, steps, period), decode_step_times(cost, period)
    prefill_s = sum(
        serving.prefill(step.contended).seconds(step.engine_s)
        * (1 + step.is_cold * step.contended * serving.cold_step_factor)
        for step in prefill
    )
    decode_s = sum(
        step.count
        * (serving.decode(step.contended).seconds(step.engine_s) + serving.request_admission_cost_s * step.num_admitted)
        for step in decode
    )
    return StepTimeDrift(
        prefill=sum(step.served_s for step in prefill) / prefill_s,
        decode=sum(step.count * step.served_s for step in decode) / decode_s,
    )
