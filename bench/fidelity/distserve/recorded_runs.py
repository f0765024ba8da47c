"""What DistServe's authors recorded of vLLM 0.2.3 serving OPT-13B: the requests that they sent, and two runs.

The data is the alignment data of their repository (see bench/README.md). Their client uses a fixed seed, so every run
of 100 requests sends the same requests with the same arrival pattern, scaled by the rate, whatever the model. These are
therefore also the requests of Figure 8's vLLM curves on ShareGPT. The rates of the recorded runs are of one GPU.
"""

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Protocol

import numpy as np
from scipy.optimize import minimize

from bench.common.distserve_costs import Coefficients, DistServeCost
from tandem.placement.workload.requests import Floats, Ints, RequestStream

_RUNS = Path(__file__).with_name("vllm_opt13b_runs.csv")
FITTED_RATE = 1


class SimulatedLatencies(Protocol):
    """Of each request; NaN where there is none."""

    @property
    def ttft_s(self) -> Floats: ...

    @property
    def tpot_s(self) -> Floats: ...


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """Of each request, in the order of `RecordedRuns`."""

    ttft_s: Floats
    tpot_s: Floats


@dataclass(frozen=True, slots=True)
class RecordedRuns:
    """`arrival_s` is for one request per second on average. `runs` is by requests per second."""

    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    runs: Mapping[int, RecordedRun]

    def stream_at(self, rate: float) -> RequestStream:
        """The requests at so many per second."""
        return RequestStream.make(self.arrival_s / rate, self.prompt_tokens, self.output_tokens)


def read_runs(path: Path = _RUNS) -> RecordedRuns:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))

    def column(name: str) -> Floats:
        return np.array([float(row[name]) for row in rows])

    return RecordedRuns(
        arrival_s=column("arrival_s"),
        prompt_tokens=column("prompt_tokens").astype(np.int64),
        output_tokens=column("output_tokens").astype(np.int64),
        runs={
            rate: RecordedRun(column(f"ttft_ms_at_{rate}") / 1e3, column(f"tpot_ms_at_{rate}") / 1e3) for rate in (1, 2)
        },
    )


def fits_to_run(
    cost: DistServeCost,
    recorded: RecordedRuns,
    simulate_with: Callable[[DistServeCost, RequestStream], SimulatedLatencies],
) -> list[DistServeCost]:
    """`cost` with prefill and small-batch decode times fitted so that the simulated run at `FITTED_RATE` is near the
    recorded one. The distance is the mean relative difference of each request's TTFT and TPOT. The nearest fit comes
    first, then the results of other starts of the search with at most 1.1 times its distance.

    Fitted are a factor and a constant of prefill, a constant and a time per sequence of decode. The fit does not use
    the share of requests that met a target.
    """
    run, stream = recorded.runs[FITTED_RATE], recorded.stream_at(FITTED_RATE)

    def distance(parameters: Floats) -> float:
        result = simulate_with(_changed(cost, parameters), stream)
        return float(np.abs(result.ttft_s / run.ttft_s - 1).mean() + np.abs(result.tpot_s / run.tpot_s - 1).mean())

    found = []
    for start in product((0.8, 1.0), (0.0, 10.0), (-2.0, 0.0), (0.0, 0.5)):
        simplex = np.vstack([start, np.array(start) + np.diag([-0.1, 5.0, -2.0, 0.3])])
        best = minimize(distance, start, method="Nelder-Mead", options={"initial_simplex": simplex, "maxfev": 300})
        found.append((float(best.fun), best.x))
    found.sort(key=lambda entry: entry[0])
    return [_changed(cost, parameters) for run_distance, parameters in found if run_distance <= 1.1 * found[0][0]]


def _changed(cost: DistServeCost, parameters: Floats) -> DistServeCost:
    """`parameters`: factor of prefill; milliseconds added to a prefill step, to a decode step, and per sequence to the
    latter."""
    factor, prefill_ms, decode_ms, sequence_ms = (float(parameter) for parameter in parameters)
    prefill, decode = cost.prefill, cost.small_decode
    return replace(
        cost,
        prefill=Coefficients(
            constant_s=factor * prefill.constant_s + prefill_ms / 1e3,
            per_token_s=factor * prefill.per_token_s,
            quadratic_s=factor * prefill.quadratic_s,
        ),
        small_decode=replace(
            decode,
            constant_s=decode.constant_s + decode_ms / 1e3,
            per_sequence_s=decode.per_sequence_s + sequence_ms / 1e3,
        ),
    )
