"""How fast a cluster's steps are now, by a calibration that was made of it before.

A virtual machine shares its memory with strangers: the same steps of the same processes may take half as long again in
one minute as in the next. What is compared with a prediction should be measured while the machine is as it was when the
prediction's numbers were.
"""

from dataclasses import dataclass

from bench.load_client import LoadClient
from bench.serving_fit import decode_pace, prefill_pace
from bench.serving_profile import Probe
from placement.costs.calibration import CalibratedCost, Calibration

_BATCH = 4


@dataclass(frozen=True, slots=True)
class Pace:
    """How long steps take, over what the calibration says."""

    prefill: float
    decode: float

    def is_usual(self, tolerance: float) -> bool:
        """Whether neither phase differs from the calibration by more than `tolerance`."""
        return abs(self.prefill - 1) <= tolerance and abs(self.decode - 1) <= tolerance


async def measure_pace(url: str, calibration: Calibration, duration_s: float) -> Pace:
    """Keeps both workers busy of a cluster that has one of each role and nothing else to do. Raises BenchError."""
    cost = CalibratedCost(calibration.terms, calibration.serving, neighbour_busy=1.0)  # no pauses: no waking either
    client = LoadClient(url)
    try:
        prompted, decoded = await Probe(client).run(_BATCH, duration_s, max_tokens=1)
    finally:
        client.close()
    return Pace(prefill=prefill_pace(cost, prompted), decode=decode_pace(cost, decoded))
