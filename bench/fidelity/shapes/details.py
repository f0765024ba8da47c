"""What is behind the figures of one shape: requests and samples, measured beside simulated."""

from typing import Any

import numpy as np

from tandem.placement.costs.serving import ServingCosts
from tandem.placement.costs.step_fit import CalibratedCost
from tandem.placement.evaluation.summary import parts_of
from tandem.placement.simulator.result import SimulationResult
from tandem.profiling.serving_fit import colocated_prompt_s, decode_step_times
from tandem.profiling.serving_samples import ColocatedSamples, prefill_steps_of

_DIGITS = 6


def requests_beside(live: SimulationResult, simulated: SimulationResult) -> list[dict[str, Any]]:
    """Of the same requests: lengths, arrival, and (live, simulated) seconds of the parts of their timelines."""
    requests = live.requests
    sides = [parts_of(result) | {"ttft_s": result.ttft_s, "tpot_s": result.tpot_s} for result in (live, simulated)]
    return [
        {
            "prompt_tokens": int(requests.prompt_tokens[row]),
            "output_tokens": int(requests.output_tokens[row]),
            "arrival_s": round(float(requests.arrival_s[row]), _DIGITS),
        }
        | {name: [round(float(side[name][row]), _DIGITS) for side in sides] for name in sides[0] if name in sides[1]}
        for row in range(len(requests))
    ]


def probes_beside_fit(engine: CalibratedCost, serving: ServingCosts, samples: ColocatedSamples) -> dict[str, Any]:
    """Prompts: [tokens, measured, fitted seconds] of each step. Decode: of each request, in the order of the periods,
    [batch, engine's, measured, fitted seconds of a step]. Waits: seconds until the prefill of each prompt began."""
    prompts = [
        [
            sum(step.lengths),
            step.duration_s,
            serving.prefill_alone.seconds(colocated_prompt_s(engine, sum(step.lengths))),
        ]
        for step in prefill_steps_of(samples.prompted)
    ]
    decode = [
        [
            [period.batch, step.engine_s, step.served_s, serving.decode_alone.factor_of(period.batch) * step.engine_s]
            for step in decode_step_times(engine, period)
        ]
        for period in samples.decoding
    ]
    waits = [[one.parts[name] for name in ("admission_s", "dispatch_s", "prefill_queue_s")] for one in samples.prompted]
    return {"prompts": _rounded(prompts), "decode": [_rounded(period) for period in decode], "waits": _rounded(waits)}


def _rounded(rows: list[list[float]]) -> list[list[float]]:
    return [[float(value) for value in np.round(row, _DIGITS)] for row in rows]
