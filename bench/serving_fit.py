"""From the answers of a measured cluster to what serving adds to steps, and what the request path takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from bench.serving_answers import Answers, Loaded, PrefillStep, Prompted, steps_of
from tandem.core.cost_model import StepLoad
from tandem.placement.costs.calibration import CalibratedCost, Calibration
from tandem.placement.costs.serving import PathCosts, ServedStep, ServingCosts
from tandem.placement.simulator.deployment import PAUSE_S

_FASTEST_BYTES_PER_S = 1e12  # where no time per token can be seen
_FAR_OFF = 0.5  # steps differ by 10 %, and a stranger makes them take twice as long
_STRANGE = 1.6  # times what is usual: a pause does not explain it
_FEW = 12  # steps: fewer of an octave do not count as much as many of another
_FEW_STEPS = 8  # of an answer: too few to tell a mean one by

Floats = npt.NDArray[np.float64]


def with_serving(engine: Calibration, answers: Answers) -> Calibration:
    """That of the engine by itself, and what serving adds. The answers must be enough."""
    serving = serving_costs(CalibratedCost(engine.terms), answers)
    return engine.model_copy(
        update={"serving": serving, "request_path": path_costs(answers, engine.kv_bytes_per_token)}
    )


def serving_costs(cost: CalibratedCost, answers: Answers) -> ServingCosts:
    """`cost`: of the engine by itself."""
    alone = [Taken(_step_s(cost, step), step.taken_s, beside=0.0) for step in steps_of(answers.prompted_alone)]
    beside = [one for loaded in answers.loaded for one in prefill_steps(cost, loaded.steps(), loaded)]
    prefill_alone, prefill_beside = served_prefill(alone + [one for one in beside if not one.is_woken])
    decode_alone, decode_beside, open_s = served_decode(
        [one for loaded in (*answers.decoded_alone, *answers.loaded) for one in decode_steps(cost, loaded)]
    )
    return ServingCosts(
        prefill_alone=prefill_alone,
        prefill_beside=prefill_beside,
        prefill_wake=wake(prefill_alone, prefill_beside, beside),
        decode_alone=decode_alone,
        decode_beside=decode_beside,
        decode_open_s=open_s,
    )


def path_costs(answers: Answers, kv_bytes_per_token: float) -> PathCosts:
    before = [
        one.parts["admission_s"] + one.parts["dispatch_s"] + one.parts["prefill_queue_s"]
        for one in answers.prompted_alone  # beside decode, its prompts may be in the queue
    ]
    answered = [*answers.prompted_alone, *(one for loaded in answers.steady for one in loaded.prompted)]
    alone_s, per_token_s = transfer_line(answers.prompted_alone)
    beside_s, turn_s = transfers_beside(answers.crowded, per_token_s)
    alone_s = max(0.0, alone_s - turn_s)
    return PathCosts(
        admission_s=median(before),
        first_token_s=max(0.0, median(one.first_s - one.ttft_s for one in answered)),
        token_s=max(0.0, median(one.whole_s - one.total_s for one in answered)),
        transfer_alone_s=alone_s,
        transfer_beside_s=max(alone_s, beside_s),
        transfer_turn_s=turn_s,
        transfer_bytes_per_s=min(_FASTEST_BYTES_PER_S, kv_bytes_per_token / max(per_token_s, 1e-15)),
    )


@dataclass(frozen=True, slots=True)
class Taken:
    """What a step takes the engine by itself, and took the worker; for which share of it the other one computed, how
    many requests came to decode meanwhile, and whether the worker had paused. The mean of `count` steps."""

    engine_s: float
    taken_s: float
    beside: float
    opened: float = 0.0
    is_woken: bool = False
    count: int = 1


def prefill_steps(cost: CalibratedCost, steps: Sequence[PrefillStep], loaded: Loaded) -> list[Taken]:
    """`steps` of those that were `loaded`. `cost`: of the engine by itself."""
    return [
        Taken(
            engine_s=_step_s(cost, step),
            taken_s=step.taken_s,
            beside=loaded.decode_share(step.began_s, step.ended_s),
            is_woken=step.idle_s > PAUSE_S,
        )
        for step in steps
    ]


def decode_steps(cost: CalibratedCost, loaded: Loaded) -> list[Taken]:
    """The mean one of each answer that had enough. Without reading KV, which takes as long as it takes the engine.
    `cost`: of the engine by itself.

    A request costs decode something as it is opened, and something while its KV comes: each is half a request.
    """
    everyone = (*loaded.decoded, *loaded.prompted)
    changed_s, steps, kv_s = _steps_until(cost, everyone)
    opened_s, arrived_s = np.sort([one.began_s for one in everyone]), np.sort([one.arrived_s for one in everyone])
    taken = []
    for one in loaded.decoded:
        span = one.decode_span
        if one.num_steps < _FEW_STEPS or span[0] == span[1]:
            continue
        expected, read_s = (float(np.diff(np.interp(span, changed_s, until))[0]) for until in (steps, kv_s))
        came = sum(int(np.diff(np.searchsorted(times_s, span, side="right"))[0]) for times_s in (opened_s, arrived_s))
        seconds = span[1] - span[0]
        taken.append(
            Taken(
                engine_s=(seconds - read_s) / expected,
                taken_s=seconds / one.num_steps - read_s / expected,
                beside=loaded.prefill_share(*span),
                opened=came / 2 / one.num_steps,
                count=one.num_steps,
            )
        )
    return taken


def _steps_until(cost: CalibratedCost, answers: Sequence[Prompted]) -> tuple[Floats, Floats, Floats]:
    """(times, steps, seconds): how many steps an answer would have had until then that was there all along, with as
    many others at once as there were, and for how long they would have read KV."""
    spans = np.array([one.decode_span for one in answers])
    kv_tokens = np.array([one.kv_tokens for one in answers])
    times_s, one_each = spans.T.ravel(), np.ones(len(spans))
    order = np.argsort(times_s)
    times_s = times_s[order]
    at_once = np.cumsum(np.concatenate((one_each, -one_each))[order])[:-1]
    kv_tokens = np.cumsum(np.concatenate((kv_tokens, -kv_tokens))[order])[:-1]
    base_s, per_token_s = np.array([cost.decode_coefficients(int(n)) if n > 0 else (np.inf, 0.0) for n in at_once]).T
    read_s = kv_tokens * per_token_s
    steps = np.diff(times_s) / (base_s + read_s)
    return times_s, _sums(steps), _sums(steps * read_s)


def _sums(parts: Floats) -> Floats:
    """Of the first none, one, two, ..."""
    return np.concatenate(([0.0], np.cumsum(parts)))


def served_prefill(steps: Sequence[Taken]) -> tuple[ServedStep, ServedStep]:
    """(alone, beside): a step lies between them by its share."""
    engine, beside = np.array([(one.engine_s, one.beside) for one in steps]).T
    alone = 1 - beside
    found = _fit(steps, np.column_stack((alone, alone * engine, beside, beside * engine)))
    alone_s, alone_factor, beside_s, beside_factor = map(float, found)
    return (
        ServedStep(constant_s=alone_s, factor=alone_factor),
        ServedStep(constant_s=beside_s, factor=beside_factor),
    )


def served_decode(steps: Sequence[Taken]) -> tuple[ServedStep, ServedStep, float]:
    """(alone, beside, open_s): a step lies between the first two by its share, and takes the last one longer for each
    request that comes meanwhile.

    Without a constant: in live runs there is none, and with little measured it would be found in `open_s`' place.
    """
    engine, beside, opened = np.array([(one.engine_s, one.beside, one.opened) for one in steps]).T
    found = _fit(steps, np.column_stack(((1 - beside) * engine, beside * engine, opened)))
    alone_factor, beside_factor, open_s = map(float, found)
    return ServedStep(factor=alone_factor), ServedStep(factor=beside_factor), open_s


def _fit(steps: Sequence[Taken], matrix: Floats) -> Floats:
    """Least squares: what takes longer varies as the root of its time, and every octave of steps counts as much as any
    other, however few were seen. Those that are far off, while a stranger had the machine, are left out."""
    engine, taken, count = np.array([(one.engine_s, one.taken_s, one.count) for one in steps]).T
    _, octave = np.unique(np.floor(np.log2(engine)), return_inverse=True)
    members = np.bincount(octave, weights=count)
    weight = np.sqrt(count / (engine * np.maximum(members[octave], _FEW)))
    found, _ = nnls(matrix * weight[:, None], taken * weight)
    weight *= np.abs(taken / (matrix @ found) - 1) <= _FAR_OFF
    found, _ = nnls(matrix * weight[:, None], taken * weight)
    return np.asarray(found)


def wake(alone: ServedStep, beside: ServedStep, steps: Sequence[Taken]) -> float:
    """How much longer, relatively, the first steps after a pause took than others, beside decode."""
    late_s = usual_s = 0.0
    for one in steps:
        step_s = alone.toward(beside, one.beside).seconds(one.engine_s)
        if one.is_woken and one.taken_s < _STRANGE * step_s:
            late_s += one.taken_s - step_s
            usual_s += one.beside * step_s
    return max(0.0, late_s / usual_s) if usual_s else 0.0


def _step_s(cost: CalibratedCost, step: PrefillStep) -> float:
    return cost.step(StepLoad.of_prompts(*step.lengths)).total_s


def transfer_line(carried: Sequence[Prompted]) -> tuple[float, float]:
    """(seconds, seconds per token) from the first token until decode has the KV, while it does nothing else."""
    lengths = sorted({one.num_tokens for one in carried})
    seconds = [median(one.parts["transfer_s"] for one in carried if one.num_tokens == n) for n in lengths]
    matrix = np.column_stack((np.ones(len(lengths)), lengths))
    (constant_s, per_token_s), _ = nnls(matrix, np.array(seconds))
    return float(constant_s), float(per_token_s)


def transfers_beside(crowded: Sequence[Loaded], per_token_s: float) -> tuple[float, float]:
    """(latency, turn) in seconds: from the first token until a decode worker that computes could take the KV of a short
    prompt, and how much longer it takes for each transfer at the same time, itself included.

    The worker takes KV between two steps: half of one passes before, on average. Prompts of one step are sent together.
    """
    together: list[int] = []
    seconds: list[float] = []
    for loaded in crowded:
        for step in loaded.steps():
            together += [len(step.prompts)] * len(step.prompts)
            waited_s = loaded.decode_step_s / 2
            seconds += [one.parts["transfer_s"] - per_token_s * one.num_tokens - waited_s for one in step.prompts]
    matrix = np.column_stack((np.ones(len(seconds)), together))
    (latency_s, turn_s), _ = nnls(matrix, np.array(seconds))
    return float(latency_s), float(turn_s)
