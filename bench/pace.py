"""How fast a cluster's steps are now, by a calibration that was made of it before.

A virtual machine shares its memory with strangers: the same steps of the same processes may take half as long again in
one minute as in the next, and twice as long for some seconds. What is compared with a prediction should be measured
while the machine is as it was when the prediction's numbers were.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from bench.serving_answers import Loaded, PrefillStep, Prompted, steps_of
from bench.serving_fit import decode_steps, prefill_steps
from tandem.core.cost_model import StepLoad
from tandem.placement.costs.calibration import CalibratedCost, Calibration
from tandem.placement.costs.serving import ServedStep

_WINDOW_S = 2.0
_ENOUGH_S = 0.2  # of steps in a window, to tell by
_DISTURBED = 1.3  # times what is usual; somebody else makes it 1.8 or 2


@dataclass(frozen=True, slots=True)
class Pace:
    """How long steps take, over what the calibration says."""

    prefill: float
    decode: float

    def is_usual(self, tolerance: float) -> bool:
        """Whether neither phase differs from the calibration by more than `tolerance`."""
        return abs(self.prefill - 1) <= tolerance and abs(self.decode - 1) <= tolerance


def disturbed_s(prompted: Sequence[Prompted], calibration: Calibration) -> float:
    """For how many seconds of a run its prefill steps took much longer than they do: somebody else had the machine.
    What a calibration may be wrong by is far from that."""
    cost = CalibratedCost(calibration.terms, calibration.serving, contended=1.0)
    taken_s, usual_s = defaultdict[int, float](float), defaultdict[int, float](float)
    for step in steps_of(prompted):
        window = int(step.began_s // _WINDOW_S)
        taken_s[window] += step.taken_s
        usual_s[window] += cost.step(StepLoad.of_prompts(*step.lengths)).total_s
    return _WINDOW_S * sum(
        seconds >= _ENOUGH_S and taken_s[window] > _DISTURBED * seconds for window, seconds in usual_s.items()
    )


def pace_of(loaded: Loaded, calibration: Calibration) -> Pace:
    """Of a cluster of one worker of each role while both were kept busy."""
    return _pace(loaded.steps(), loaded, calibration)


def pace_in(run: Sequence[Prompted], calibration: Calibration) -> Pace:
    """Of such a cluster while it answered these."""
    return _pace(steps_of(run), Loaded(tuple(run)), calibration)


def with_pace(calibration: Calibration, pace: Pace) -> Calibration:
    """What it would have been at this pace."""

    def paced(step: ServedStep, times: float) -> ServedStep:
        return ServedStep(constant_s=times * step.constant_s, factor=times * step.factor)

    serving = calibration.serving
    changed = {
        "prefill_alone": paced(serving.prefill_alone, pace.prefill),
        "prefill_contended": paced(serving.prefill_contended, pace.prefill),
        "decode_alone": paced(serving.decode_alone, pace.decode),
        "decode_contended": paced(serving.decode_contended, pace.decode),
        "request_admission_cost_s": pace.decode * serving.request_admission_cost_s,
    }
    return calibration.model_copy(update={"serving": serving.model_copy(update=changed)})


def _pace(steps: Sequence[PrefillStep], loaded: Loaded, calibration: Calibration) -> Pace:
    cost, serving = CalibratedCost(calibration.terms), calibration.serving
    prefill, decode = prefill_steps(cost, steps, loaded), decode_steps(cost, loaded)
    prefill_s = sum(
        serving.prefill(one.beside).seconds(one.engine_s) * (1 + one.is_woken * one.beside * serving.cold_step_factor)
        for one in prefill
    )
    decode_s = sum(
        one.count * (serving.decode(one.beside).seconds(one.engine_s) + serving.request_admission_cost_s * one.opened)
        for one in decode
    )
    return Pace(
        prefill=sum(one.taken_s for one in prefill) / prefill_s,
        decode=sum(one.count * one.taken_s for one in decode) / decode_s,
    )
