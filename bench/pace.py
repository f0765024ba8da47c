"""How fast a cluster's steps are now, by a calibration that was made of it before.

A virtual machine shares its memory with strangers: the same steps of the same processes may take half as long again in
one minute as in the next. What is compared with a prediction should be measured while the machine is as it was when the
prediction's numbers were.
"""

from dataclasses import dataclass

from bench.serving_answers import Loaded
from bench.serving_fit import decode_step, prefill_steps
from placement.costs.calibration import CalibratedCost, Calibration


@dataclass(frozen=True, slots=True)
class Pace:
    """How long steps take, over what the calibration says."""

    prefill: float
    decode: float

    def is_usual(self, tolerance: float) -> bool:
        """Whether neither phase differs from the calibration by more than `tolerance`."""
        return abs(self.prefill - 1) <= tolerance and abs(self.decode - 1) <= tolerance


def pace_of(loaded: Loaded, calibration: Calibration) -> Pace:
    """Of a cluster of one worker of each role while both were kept busy, without pauses."""
    cost, serving = CalibratedCost(calibration.terms), calibration.serving
    steps = [one for one in prefill_steps(cost, loaded) if not one.is_woken]
    prefill_s = sum(serving.prefill(one.beside).seconds(one.engine_s) for one in steps)
    decode = decode_step(cost, loaded)
    decode_s = serving.decode(decode.beside).seconds(decode.engine_s) + serving.decode_join_s * decode.joined
    return Pace(prefill=sum(one.taken_s for one in steps) / prefill_s, decode=decode.taken_s / decode_s)
