"""From the answers of a measured cluster to what serving adds to the engine's steps, and what the road takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import numpy as np
from scipy.optimize import nnls

from bench.serving_answers import Answers, Decoded, Loaded, PrefillStep, Prompted, steps_of
from core.cost_model import StepLoad
from placement.costs.calibration import CalibratedCost, Calibration
from placement.costs.serving import RoadCosts, ServedStep, ServingCosts
from placement.simulator.deployment import PAUSE_S

_FASTEST_BYTES_PER_S = 1e12  # where no time per token can be seen
_FAR_OFF = 0.25  # steps differ by 8 %
_STRANGE = 1.6  # times what is usual: a pause does not explain it
_FEW = 12  # steps: fewer of an octave do not count as much as many of another

Spans = Sequence[tuple[float, float]]


def with_serving(engine: Calibration, answers: Answers) -> Calibration:
    """That of the engine by itself, and what serving adds. The answers must be enough."""
    serving = serving_costs(CalibratedCost(engine.terms), answers)
    return engine.model_copy(update={"serving": serving, "road": road_costs(answers, engine.kv_bytes_per_token)})


def serving_costs(cost: CalibratedCost, answers: Answers) -> ServingCosts:
    """`cost`: of the engine by itself."""
    alone = [Taken(_step_s(cost, step), step.taken_s, beside=0.0) for step in steps_of(answers.prompted_alone)]
    beside = [one for loaded in answers.loaded for one in prefill_steps(cost, loaded)]
    prefill_alone, prefill_beside, _ = served(alone + [one for one in beside if not one.is_woken])
    decode_alone, decode_beside, join_s = served(
        [_decode_step(cost, one) for one in answers.decoded_alone]
        + [decode_step(cost, loaded) for loaded in answers.loaded]
    )
    return ServingCosts(
        prefill_alone=prefill_alone,
        prefill_beside=prefill_beside,
        prefill_wake=wake(prefill_alone, prefill_beside, beside),
        decode_alone=decode_alone,
        decode_beside=decode_beside,
        decode_join_s=join_s,
    )


def road_costs(answers: Answers, kv_bytes_per_token: float) -> RoadCosts:
    before = [
        one.parts["admission_s"] + one.parts["dispatch_s"] + one.parts["prefill_queue_s"]
        for one in answers.prompted_alone  # beside decode, its prompts may be in the queue
    ]
    answered = [*answers.prompted_alone, *(one for loaded in answers.steady for one in loaded.prompted)]
    alone_s, per_token_s = transfer_line(answers.prompted_alone)
    beside_s, turn_s = transfers_beside(answers.crowded, per_token_s)
    alone_s = max(0.0, alone_s - turn_s)
    return RoadCosts(
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
    many sequences joined, and whether the worker had paused."""

    engine_s: float
    taken_s: float
    beside: float
    joined: float = 0.0
    is_woken: bool = False


def prefill_steps(cost: CalibratedCost, loaded: Loaded) -> list[Taken]:
    """`cost`: of the engine by itself."""
    return [
        Taken(
            engine_s=_step_s(cost, step),
            taken_s=step.taken_s,
            beside=loaded.decode_share(step.began_s, step.ended_s),
            is_woken=step.idle_s > PAUSE_S,
        )
        for step in loaded.steps()
    ]


def decode_step(cost: CalibratedCost, loaded: Loaded) -> Taken:
    """The mean one. `cost`: of the engine by itself."""
    return _decode_step(cost, loaded.decoded, loaded.prefill_share, loaded.joined)


def _decode_step(cost: CalibratedCost, decoded: Decoded, beside: float = 0.0, joined: Spans = ()) -> Taken:
    """`joined`: spans of others' answers. Without reading KV, which takes as long as it takes the engine."""
    steps, kv_s = _predicted_steps(cost, decoded, joined)
    return Taken(
        engine_s=decoded.seconds / steps - kv_s,
        taken_s=decoded.step_s - kv_s,
        beside=beside,
        joined=(len(decoded.spans) + len(joined)) * decoded.step_s / decoded.busy_s,
    )


def served(steps: Sequence[Taken]) -> tuple[ServedStep, ServedStep, float]:
    """(alone, beside, join_s): a step lies between the first two by its share, and takes the last one longer for each
    sequence that joins.

    Least squares: what takes longer varies as the root of its time, and every octave of steps counts as much as any
    other, however few were seen. Those that are far off, while a stranger had the machine, are left out.
    """
    engine = np.array([one.engine_s for one in steps])
    beside = np.array([one.beside for one in steps])
    joined = np.array([one.joined for one in steps])
    taken = np.array([one.taken_s for one in steps])
    alone = 1 - beside
    matrix = np.column_stack((alone, alone * engine, beside, beside * engine, joined))
    _, octave, members = np.unique(np.floor(np.log2(engine)), return_inverse=True, return_counts=True)
    weight = 1 / np.sqrt(engine * np.maximum(members[octave], _FEW))
    found, _ = nnls(matrix * weight[:, None], taken * weight)
    weight *= np.abs(taken / (matrix @ found) - 1) <= _FAR_OFF
    found, _ = nnls(matrix * weight[:, None], taken * weight)
    alone_s, alone_factor, beside_s, beside_factor, join_s = map(float, found)
    return (
        ServedStep(constant_s=alone_s, factor=alone_factor),
        ServedStep(constant_s=beside_s, factor=beside_factor),
        join_s,
    )


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


def _predicted_steps(cost: CalibratedCost, decoded: Decoded, joined: Spans) -> tuple[float, float]:
    """How many steps all answers together would have had in their spans, with as many at once as there were, and the
    mean seconds of these steps in which KV is read."""
    changes = [change for start_s, end_s in decoded.spans for change in ((start_s, 1, 1), (end_s, -1, -1))]
    changes += [change for start_s, end_s in joined for change in ((start_s, 0, 1), (end_s, 0, -1))]
    steps, kv_s, own, at_once = 0.0, 0.0, 0, 0
    for (at_s, more_own, more), (next_s, *_) in pairwise(sorted(changes)):
        own, at_once = own + more_own, at_once + more
        if own and next_s > at_s:
            base_s, per_token_s = cost.decode_line(at_once)
            read_s = at_once * decoded.kv_tokens * per_token_s
            count = own * (next_s - at_s) / (base_s + read_s)
            steps, kv_s = steps + count, kv_s + count * read_s
    return steps, kv_s / steps


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
            waited_s = loaded.decoded.step_s / 2
            seconds += [one.parts["transfer_s"] - per_token_s * one.num_tokens - waited_s for one in step.prompts]
    matrix = np.column_stack((np.ones(len(seconds)), together))
    (latency_s, turn_s), _ = nnls(matrix, np.array(seconds))
    return float(latency_s), float(turn_s)
