"""Fits what serving adds to the engine's steps, and the costs of the request path, to the samples of a cluster."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from tandem.core.cost_model import StepLoad, attention_pairs, following_s
from tandem.placement.costs.calibration import Calibration
from tandem.placement.costs.serving import PathCosts, ServedStep, ServingCosts
from tandem.placement.costs.step_fit import CalibratedCost
from tandem.placement.simulator.deployment import PAUSE_S
from tandem.profiling.serving_samples import (
    ColocatedSamples,
    LoadPeriod,
    PrefillStep,
    RequestSample,
    ServingSamples,
    prefill_steps_of,
)
from tandem.scheduling.budget import COLOCATED_BATCH_TOKENS

_MAX_BYTES_PER_S = 1e12  # where no time per token can be seen
_OUTLIER = 0.5  # relative error. Steps vary by 10 %; other load on the machine doubles their time
_COLD_OUTLIER = 1.6  # times the usual time: more than a pause explains
_FEW_IN_OCTAVE = 12  # fewer steps than this in an octave do not weigh as much as many in another
_MIN_DECODE_STEPS = 8  # of a request, for a mean step time

Floats = npt.NDArray[np.float64]


def with_serving(engine: Calibration, samples: ServingSamples) -> Calibration:
    """`engine`, the calibration of the engine alone, with serving and path costs. The samples `can_be_fitted`."""
    serving = fit_serving(CalibratedCost(engine.terms), samples)
    return engine.model_copy(update={"serving": serving, "request_path": fit_path(samples, engine.kv_bytes_per_token)})


def fit_serving(cost: CalibratedCost, samples: ServingSamples) -> ServingCosts:
    """`cost`: of the engine alone."""
    alone = [
        StepTime(_prefill_s(cost, step), step.duration_s, contended=0.0)
        for step in prefill_steps_of(samples.prefill_alone)
    ]
    contended = [
        step for period in samples.contended for step in prefill_step_times(cost, period.prefill_steps(), period)
    ]
    prefill_alone, prefill_contended = fit_prefill(alone + [step for step in contended if not step.is_cold])
    decode_alone, decode_contended, request_admission_cost_s = fit_decode(
        [step for period in (*samples.decode_alone, *samples.contended) for step in decode_step_times(cost, period)]
    )
    return ServingCosts(
        prefill_alone=prefill_alone,
        prefill_contended=prefill_contended,
        cold_step_factor=fit_cold_step_factor(prefill_alone, prefill_contended, contended),
        decode_alone=decode_alone,
        decode_contended=decode_contended,
        request_admission_cost_s=request_admission_cost_s,
    )


def fit_alone(cost: CalibratedCost, samples: ColocatedSamples) -> tuple[ServedStep, ServedStep]:
    """(prefill, decode) of a colocated instance that has the machine for itself. `cost`: of the engine alone."""
    prompts = [
        StepTime(colocated_prompt_s(cost, sum(step.lengths)), step.duration_s, contended=0.0)
        for step in prefill_steps_of(samples.prompted)
    ]
    return fit_prefill(prompts)[0], fit_decode_alone(cost, samples.decoding)


def colocated_prompt_s(cost: CalibratedCost, num_tokens: int) -> float:
    """Seconds of a prompt alone on a colocated instance. Pipeline stages share the budget of a step, so chunks of a
    prompt follow each other."""
    of_step = -(-COLOCATED_BATCH_TOKENS // cost.num_stages)
    chunks = ((start, min(of_step, num_tokens - start)) for start in range(0, num_tokens, of_step))
    loads = (
        StepLoad(
            prefill_tokens=count,
            prefill_sequences=1,
            prefill_pairs=attention_pairs(start, count),
            prefill_kv_tokens=start + count,
            sampled=int(start + count == num_tokens),
        )
        for start, count in chunks
    )
    return following_s(cost.one_step(load) for load in loads)


def fit_router(requests: Sequence[RequestSample]) -> tuple[float, float, float]:
    """(admission_s, first_token_s, token_s), as in `PathCosts`: medians."""
    before_prefill_s = [
        request.parts["admission_s"] + request.parts["dispatch_s"] + request.parts["prefill_queue_s"]
        for request in requests
    ]
    first_s = median(request.client_ttft_s - request.server_ttft_s for request in requests)
    last_s = median(request.client_total_s - request.server_total_s for request in requests)
    return median(before_prefill_s), max(0.0, first_s), max(0.0, last_s)


def fit_path(samples: ServingSamples, kv_bytes_per_token: float) -> PathCosts:
    admission_s, _, _ = fit_router(samples.prefill_alone)  # under load, requests wait in the queue
    requests = [*samples.prefill_alone, *(request for period in samples.steady for request in period.prompted)]
    alone_s, per_token_s = fit_transfer(samples.prefill_alone)
    contended_s, per_concurrent_transfer_s = fit_concurrent_transfers(samples.concurrent, per_token_s)
    alone_s = max(0.0, alone_s - per_concurrent_transfer_s)
    _, first_token_s, token_s = fit_router(requests)
    return PathCosts(
        admission_s=admission_s,
        first_token_s=first_token_s,
        token_s=token_s,
        transfer_alone_s=alone_s,
        transfer_contended_s=max(alone_s, contended_s),
        per_concurrent_transfer_s=per_concurrent_transfer_s,
        transfer_bytes_per_s=min(_MAX_BYTES_PER_S, kv_bytes_per_token / max(per_token_s, 1e-15)),
    )


@dataclass(frozen=True, slots=True)
class StepTime:
    """A step, or the mean of `count` steps: `engine_s` in the engine alone by its calibration, `served_s` in a worker.

    `contended`: share of the step during which the other worker computed. `num_admitted`: requests that decode admitted
    during the step. `is_cold`: the worker had paused before."""

    engine_s: float
    served_s: float
    contended: float
    num_admitted: float = 0.0
    is_cold: bool = False
    count: int = 1


def prefill_step_times(cost: CalibratedCost, steps: Sequence[PrefillStep], period: LoadPeriod) -> list[StepTime]:
    """Of `steps` in the period. `cost`: of the engine alone."""
    return [
        StepTime(
            engine_s=_prefill_s(cost, step),
            served_s=step.duration_s,
            contended=period.decode_share(step.began_s, step.ended_s),
            is_cold=step.idle_s > PAUSE_S,
        )
        for step in steps
    ]


def decode_step_times(cost: CalibratedCost, period: LoadPeriod) -> list[StepTime]:
    """The mean step of each decoding request with enough steps, without reading KV, which takes the worker as long as
    the engine. `cost`: of the engine alone.

    A request costs decode time when it is admitted and when its KV arrives: each counts as half an admission.
    """
    requests = (*period.decoding, *period.prompted)
    times_s, steps, kv_read_s = _expected_steps_until(cost, requests)
    began_s = np.sort([request.prefill_began_s for request in requests])
    arrived_s = np.sort([request.kv_arrived_s for request in requests])
    step_times = []
    for request in period.decoding:
        span = request.decode_span
        if request.num_decode_steps < _MIN_DECODE_STEPS or span[0] == span[1]:
            continue
        expected, read_s = (float(np.diff(np.interp(span, times_s, until))[0]) for until in (steps, kv_read_s))
        num_events = sum(
            int(np.diff(np.searchsorted(event_s, span, side="right"))[0]) for event_s in (began_s, arrived_s)
        )
        duration_s = span[1] - span[0]
        step_times.append(
            StepTime(
                engine_s=(duration_s - read_s) / expected,
                served_s=duration_s / request.num_decode_steps - read_s / expected,
                contended=period.prefill_share(*span),
                num_admitted=num_events / 2 / request.num_decode_steps,
                count=request.num_decode_steps,
            )
        )
    return step_times


def _expected_steps_until(cost: CalibratedCost, requests: Sequence[RequestSample]) -> tuple[Floats, Floats, Floats]:
    """(times, steps, seconds): at each time, the decode steps that the engine alone would have computed since the first
    time, with the batches that there were, and the seconds of these steps that read KV."""
    spans = np.array([request.decode_span for request in requests])
    kv_tokens = np.array([request.mean_kv_tokens for request in requests])
    times_s, ones = spans.T.ravel(), np.ones(len(spans))
    order = np.argsort(times_s)
    times_s = times_s[order]
    batch = np.cumsum(np.concatenate((ones, -ones))[order])[:-1]
    kv_tokens = np.cumsum(np.concatenate((kv_tokens, -kv_tokens))[order])[:-1]
    base_s, per_token_s = np.array([cost.decode_coefficients(int(n)) if n > 0 else (np.inf, 0.0) for n in batch]).T
    read_s = kv_tokens * per_token_s
    steps = np.diff(times_s) / (base_s + read_s)
    return times_s, _cumulative(steps), _cumulative(steps * read_s)


def _cumulative(parts: Floats) -> Floats:
    """Sums of the first 0, 1, 2, ... parts."""
    return np.concatenate(([0.0], np.cumsum(parts)))


def fit_prefill(steps: Sequence[StepTime]) -> tuple[ServedStep, ServedStep]:
    """(alone, contended): a step lies between them by its share."""
    engine_s, contended = np.array([(step.engine_s, step.contended) for step in steps]).T
    alone = 1 - contended
    found = _fit(steps, np.column_stack((alone, alone * engine_s, contended, contended * engine_s)))
    alone_s, alone_factor, contended_s, contended_factor = map(float, found)
    return (
        ServedStep(constant_s=alone_s, factor=alone_factor),
        ServedStep(constant_s=contended_s, factor=contended_factor),
    )


def fit_decode(steps: Sequence[StepTime]) -> tuple[ServedStep, ServedStep, float]:
    """(alone, contended, admission cost): a step lies between the first two by its share, and takes the admission cost
    longer for each request admitted during it.

    Without a constant: live runs have none, and a fit of few steps would confuse one with the admission cost.
    """
    engine_s, contended, admitted = np.array([(step.engine_s, step.contended, step.num_admitted) for step in steps]).T
    found = _fit(steps, np.column_stack(((1 - contended) * engine_s, contended * engine_s, admitted)))
    alone_factor, contended_factor, request_admission_cost_s = map(float, found)
    return ServedStep(factor=alone_factor), ServedStep(factor=contended_factor), request_admission_cost_s


def fit_decode_alone(cost: CalibratedCost, periods: Sequence[LoadPeriod]) -> ServedStep:
    """Of an instance that has the machine for itself, by batch. What its process does beside a step grows with the
    batch; where its ranks take all cores, they also wait for each other whenever the router or a client runs. `cost`:
    of the engine alone."""
    by_batch = {
        batch: [
            replace(step, contended=0.0)  # its own prompts are among those admitted
            for period in periods
            if period.batch == batch
            for step in decode_step_times(cost, period)
        ]
        for batch in sorted({period.batch for period in periods})
    }
    factors = {batch: fit_decode(steps)[0].factor for batch, steps in by_batch.items() if steps}
    return ServedStep(factor=median(factors.values()), by_batch=tuple(factors.items()))


def _fit(steps: Sequence[StepTime], matrix: Floats) -> Floats:
    """Least squares. A step's variance is proportional to its time, and every octave of step times has the same weight,
    however few steps it has. A second fit leaves out outliers: steps that other processes on the machine slowed."""
    engine_s, served_s, count = np.array([(step.engine_s, step.served_s, step.count) for step in steps]).T
    _, octave = np.unique(np.floor(np.log2(engine_s)), return_inverse=True)
    octave_count = np.bincount(octave, weights=count)
    weight = np.sqrt(count / (engine_s * np.maximum(octave_count[octave], _FEW_IN_OCTAVE)))
    found, _ = nnls(matrix * weight[:, None], served_s * weight)
    weight *= np.abs(served_s / (matrix @ found) - 1) <= _OUTLIER
    found, _ = nnls(matrix * weight[:, None], served_s * weight)
    return np.asarray(found)


def fit_cold_step_factor(alone: ServedStep, contended: ServedStep, steps: Sequence[StepTime]) -> float:
    """Extra time of the first contended step after a pause, as a share of the usual time."""
    extra_s = usual_s = 0.0
    for step in steps:
        step_s = alone.interpolate(contended, step.contended).seconds(step.engine_s)
        if step.is_cold and step.served_s < _COLD_OUTLIER * step_s:
            extra_s += step.served_s - step_s
            usual_s += step.contended * step_s
    return max(0.0, extra_s / usual_s) if usual_s else 0.0


def _prefill_s(cost: CalibratedCost, step: PrefillStep) -> float:
    return cost.step(StepLoad.of_prompts(*step.lengths)).total_s


def fit_transfer(requests: Sequence[RequestSample]) -> tuple[float, float]:
    """(seconds, seconds per token) from the first token until decode has the KV, while decode is idle."""
    lengths = sorted({request.num_prompt_tokens for request in requests})
    seconds = [
        median(request.parts["transfer_s"] for request in requests if request.num_prompt_tokens == length)
        for length in lengths
    ]
    matrix = np.column_stack((np.ones(len(lengths)), lengths))
    (constant_s, per_token_s), _ = nnls(matrix, np.array(seconds))
    return float(constant_s), float(per_token_s)


def fit_concurrent_transfers(periods: Sequence[LoadPeriod], per_token_s: float) -> tuple[float, float]:
    """(latency, per concurrent transfer) in seconds: from the first token until a busy decode worker could receive the
    KV of a short prompt, and the extra time for each concurrent transfer, this one included.

    The worker receives KV between two steps, after a wait of half a step on average. The prompts of one prefill step
    are sent concurrently.
    """
    num_concurrent: list[int] = []
    seconds: list[float] = []
    for period in periods:
        wait_s = period.mean_decode_step_s / 2
        for step in period.prefill_steps():
            num_concurrent += [len(step.prompts)] * len(step.prompts)
            seconds += [
                request.parts["transfer_s"] - per_token_s * request.num_prompt_tokens - wait_s
                for request in step.prompts
            ]
    matrix = np.column_stack((np.ones(len(seconds)), num_concurrent))
    (latency_s, per_concurrent_transfer_s), _ = nnls(matrix, np.array(seconds))
    return float(latency_s), float(per_concurrent_transfer_s)
