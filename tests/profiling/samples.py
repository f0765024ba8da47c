"""Samples of an imaginary cluster, whose engine takes what `TERMS` say."""

import math
from types import SimpleNamespace
from typing import cast

from tandem.core.cost_model import StepLoad
from tandem.placement.costs.calibration import Calibration
from tandem.placement.costs.serving import ServedStep, ServingCosts
from tandem.placement.costs.step_fit import CalibratedCost, Terms
from tandem.profiling.serving_samples import LoadPeriod, RequestSample, ServingSamples

TERMS = Terms(
    linear=((1, 0.010), (256, 0.300)),
    attention_per_pair=0.0,
    kv_read=((1, 1e-6),),
    kv_per_sequence=0.0,
    head=0.0,
    head_per_sampled=0.0,
)
ENGINE = CalibratedCost(TERMS)  # the engine alone
KV_TOKENS = 100  # mean of each sequence while it decodes


def prompt_s(*lengths: int) -> float:
    return ENGINE.step(StepLoad.of_prompts(*lengths)).total_s


def step_s(batch: int) -> float:
    base_s, per_token_s = ENGINE.decode_coefficients(batch)
    return base_s + batch * KV_TOKENS * per_token_s


def prompted(
    num_tokens: int,
    prefill_s: float,
    transfer_s: float = 0.0,
    began_s: float = 0.0,
    decode_s: float = 0.0,
    num_output_tokens: int = 3,
) -> RequestSample:
    before = {"admission_s": 0.001, "dispatch_s": 0.0005, "prefill_queue_s": 0.0025, "prefill_s": prefill_s}
    ttft_s = sum(before.values())
    after = {"transfer_s": transfer_s, "decode_queue_s": 0.0, "decode_s": decode_s}
    total_s = ttft_s + sum(after.values())
    return RequestSample(
        num_prompt_tokens=num_tokens,
        num_output_tokens=num_output_tokens,
        prefill_began_s=began_s,
        client_ttft_s=ttft_s + 0.002,
        client_total_s=total_s + 0.003,
        server_ttft_s=ttft_s,
        server_total_s=total_s,
        parts=before | after,
    )


def decoding(num_steps: int, *spans: tuple[float, float]) -> tuple[RequestSample, ...]:
    """Requests with `num_steps` decode steps each, in the spans (start, end); each prompt took 1 ms before."""

    def request(start_s: float, end_s: float) -> RequestSample:
        num_output_tokens = num_steps + 1
        return prompted(
            KV_TOKENS - num_output_tokens // 2,
            prefill_s=0.001,
            began_s=start_s - 0.001,
            decode_s=end_s - start_s - 0.001,  # the last token takes 1 ms more to the client than the first one
            num_output_tokens=num_output_tokens,
        )

    return tuple(request(*span) for span in spans)


def cluster_samples(prefill: ServedStep, decode: ServedStep) -> ServingSamples:
    """Of a cluster whose contended workers take `prefill` and `decode`, and otherwise as long as the engine."""

    def period(began_s: float, *lengths: int) -> LoadPeriod:
        duration_s = prefill.seconds(prompt_s(*lengths))
        prompts = tuple(prompted(n, duration_s, 0.01, began_s, decode_s=-0.011) for n in lengths)
        contended_steps = duration_s / decode.seconds(step_s(1))
        num_steps = max(10, math.ceil(contended_steps))
        ended_s = began_s + duration_s + (num_steps - contended_steps) * step_s(1)
        return LoadPeriod(decoding(num_steps, (began_s, ended_s)), prompts)

    alone = [prompted(n, prompt_s(n), transfer_s=0.004 + n * 1e-5, began_s=10.0 * n) for n in (32, 64, 160)]
    decode_alone = [LoadPeriod(decoding(100, (0.0, 100 * step_s(1))))]
    steady = [period(10.0 * n, n) for n in (32, 64, 256)]
    return ServingSamples(alone, decode_alone, steady, [], [period(70.0, 32, 64)])


def calibration(serving: ServingCosts) -> Calibration:
    """With the fields that drift is computed from."""
    return cast(Calibration, SimpleNamespace(terms=TERMS, serving=serving))
