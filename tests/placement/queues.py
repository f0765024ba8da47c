"""Queues with a known solution in the form of simulations."""

import numpy as np

from tandem.core.timeline import Stage
from tandem.placement.evaluation.goodput import StopWhen
from tandem.placement.simulator import Progress
from tandem.placement.simulator.result import STAGES, SimulationResult
from tandem.placement.workload.requests import Floats, RequestStream


def result_of(
    requests: RequestStream, first_token_s: Floats, finished_s: Floats, end_s: float | None = None
) -> SimulationResult:
    """A run with three stages; NaN if a stage was not reached. With `end_s` the run was stopped at that time."""
    stamps = np.full((len(requests), len(STAGES)), np.nan)
    stamps[:, STAGES.index(Stage.RECEIVED)] = requests.arrival_s
    stamps[:, STAGES.index(Stage.FIRST_TOKEN)] = first_token_s
    stamps[:, STAGES.index(Stage.FINISHED)] = finished_s
    if end_s is not None:
        stamps[stamps > end_s] = np.nan
    ones = np.ones(len(requests), dtype=np.int64)
    end = float(np.nanmax(stamps)) if end_s is None else end_s
    return SimulationResult(requests, stamps, ones, ones * 0, end, (), stopped_early=end_s is not None)


class SingleServer:
    """First come, first served; a prompt's token takes `token_s`. Decoding costs nothing: `tpot_s` for each token."""

    def __init__(self, token_s: float, tpot_s: float = 0.0) -> None:
        self._token_s = token_s
        self._tpot_s = tpot_s
        self.rates: list[float] = []

    def __call__(self, requests: RequestStream, stop_when: StopWhen | None = None) -> SimulationResult:
        self.rates.append(requests.rate)
        service_s = requests.prompt_tokens * self._token_s
        done_s = np.cumsum(service_s)
        start_s = np.maximum.accumulate(requests.arrival_s - (done_s - service_s)) + (done_s - service_s)
        first_s = start_s + service_s
        finished_s = first_s + (requests.output_tokens - 1) * self._tpot_s
        if stop_when is not None:
            ordered = np.sort(finished_s)
            for count in range(100, len(requests), 100):
                now_s = float(requests.arrival_s[count])
                finished = int(np.searchsorted(ordered, now_s, side="right"))
                so_far = result_of(requests, first_s, finished_s, end_s=now_s)
                if stop_when(Progress(now_s, finished, 0, so_far.stamps, np.full(len(requests), np.nan))):
                    return so_far
        return result_of(requests, first_s, finished_s)
