"""From the answers of a measured cluster to what serving adds to the engine's steps, and what the road takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import mean, median

import numpy as np
from scipy.optimize import nnls

from core.cost_model import StepLoad
from placement.costs.calibration import CalibratedCost
from placement.costs.serving import RoadCosts, ServedStep, ServingCosts

_FASTEST_BYTES_PER_S = 1e12  # where no time per token can be seen
_PAUSE_S = 0.03  # from when on a worker has paused
_SAME_STEP_S = 0.002  # prompts whose steps end within this were in one


@dataclass(frozen=True, slots=True)
class Prompted:
    """A short answer: its prompt's length, what its client waited, and the parts of its timeline."""

    num_tokens: int
    paused_s: float  # for so long nothing had been asked of the worker
    began_s: float  # its step, on the clock of `Decoded.spans`
    first_s: float  # since it was sent
    whole_s: float
    ttft_s: float  # as the server has it
    total_s: float
    parts: Mapping[str, float]

    @property
    def ended_s(self) -> float:
        return self.began_s + self.parts["prefill_s"]


@dataclass(frozen=True, slots=True)
class Decoded:
    """Answers of `batch` clients, each of whom asks again at once. `spans`: from when to when each answer had its
    steps. `kv_tokens`: of one sequence, on average."""

    batch: int
    kv_tokens: float
    num_steps: int  # of all answers together
    spans: tuple[tuple[float, float], ...]

    @property
    def step_s(self) -> float:
        """A mean step, as the answers saw it."""
        return self.seconds / self.num_steps

    @property
    def seconds(self) -> float:
        """Of all answers together."""
        return sum(end_s - start_s for start_s, end_s in self.spans)

    def is_busy(self, start_s: float, end_s: float) -> bool:
        """Whether there was always somebody to decode for."""
        for span_start_s, span_end_s in sorted(self.spans):
            if span_start_s <= start_s < span_end_s:
                start_s = span_end_s
        return start_s >= end_s


@dataclass(slots=True)
class Answers:
    """What was collected while the other worker had nothing to do, beside a busy one, and with transfers beside
    decode, several at once."""

    prompted_alone: list[Prompted] = field(default_factory=list)
    prompted_beside: list[Prompted] = field(default_factory=list)
    decoded_alone: list[Decoded] = field(default_factory=list)
    decoded_beside: list[Decoded] = field(default_factory=list)
    carried_beside: list[tuple[list[Prompted], Decoded]] = field(default_factory=list)

    @property
    def is_enough(self) -> bool:
        """Whether there is something to fit with."""
        return bool(self.prompted_beside) and any(prompted for prompted, _ in self.carried_beside)

    def serving(self, cost: CalibratedCost) -> ServingCosts:
        """`cost`: of the engine by itself."""
        beside, wake_s = served_prompts_beside(cost, self.prompted_beside)
        return ServingCosts(
            prefill_alone=served_prompts(cost, self.prompted_alone),
            prefill_beside=beside,
            prefill_wake_s=wake_s,
            decode_alone=served_decode(cost, self.decoded_alone),
            decode_beside=served_decode(cost, self.decoded_beside),
        )

    def road(self, kv_bytes_per_token: float) -> RoadCosts:
        before = [
            one.parts["admission_s"] + one.parts["dispatch_s"] + one.parts["prefill_queue_s"]
            for one in self.prompted_alone  # beside decode, its prompts may be in the queue
        ]
        answered = [*self.prompted_alone, *self.prompted_beside]
        alone_s, per_token_s = transfer_line(self.prompted_alone)
        beside_s, turn_s = transfers_beside(self.carried_beside, per_token_s)
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


def served_prompts(cost: CalibratedCost, prompted: Sequence[Prompted]) -> ServedStep:
    """Each prompt was computed in a step of its own. `cost`: of the engine by itself."""
    engine_s, taken_s = _mean_steps(cost, prompted)
    constant_s, factor = _least_squares([[1.0, one] for one in engine_s], taken_s)
    return ServedStep(constant_s=constant_s, factor=factor)


def served_prompts_beside(cost: CalibratedCost, prompted: Sequence[Prompted]) -> tuple[ServedStep, float]:
    """The same, and how many seconds more the first step after a pause takes."""
    rows: list[list[float]] = []
    taken_s: list[float] = []
    for paused in (False, True):
        alike = [one for one in prompted if (one.paused_s > _PAUSE_S) is paused]
        engine_s, seconds = _mean_steps(cost, alike)
        rows += [[1.0, one, float(paused)] for one in engine_s]
        taken_s += seconds
    constant_s, factor, wake_s = _least_squares(rows, taken_s)
    return ServedStep(constant_s=constant_s, factor=factor), wake_s


def _mean_steps(cost: CalibratedCost, prompted: Sequence[Prompted]) -> tuple[list[float], list[float]]:
    """What a step takes the engine, and took the worker, by the prompt's length."""
    lengths = sorted({one.num_tokens for one in prompted})
    engine_s = [cost.step(StepLoad.of_prompts(n)).total_s for n in lengths]
    return engine_s, [mean(one.parts["prefill_s"] for one in prompted if one.num_tokens == n) for n in lengths]


def served_decode(cost: CalibratedCost, decoded: Sequence[Decoded]) -> ServedStep:
    """`cost`: of the engine by itself."""
    engine_s = [one.seconds / _predicted_steps(cost, one) for one in decoded]
    constant_s, factor = _least_squares([[1.0, one] for one in engine_s], [one.step_s for one in decoded])
    return ServedStep(constant_s=constant_s, factor=factor)


def _least_squares(rows: Sequence[Sequence[float]], taken_s: Sequence[float]) -> list[float]:
    """Coefficients of the rows' columns, none negative, for the least relative errors."""
    taken = np.array(taken_s)
    found, _ = nnls(np.array(rows) / taken[:, None], np.ones(len(taken)))
    return [float(one) for one in found]


def prefill_pace(cost: CalibratedCost, prompted: Sequence[Prompted]) -> float:
    """Time taken over time predicted."""
    taken_s = sum(one.parts["prefill_s"] for one in prompted)
    return taken_s / sum(cost.step(StepLoad.of_prompts(one.num_tokens)).total_s for one in prompted)


def decode_pace(cost: CalibratedCost, decoded: Decoded) -> float:
    """Time taken over time predicted."""
    return _predicted_steps(cost, decoded) / decoded.num_steps


def _predicted_steps(cost: CalibratedCost, decoded: Decoded) -> float:
    """How many steps all answers together would have had in their spans, with as many at once as there were."""
    changes = sorted([(start_s, 1) for start_s, _ in decoded.spans] + [(end_s, -1) for _, end_s in decoded.spans])
    steps, at_once = 0.0, 0
    for (at_s, change), (next_s, _) in pairwise(changes):
        at_once += change
        if at_once:
            base_s, per_token_s = cost.decode_line(at_once)
            steps += at_once * (next_s - at_s) / (base_s + at_once * decoded.kv_tokens * per_token_s)
    return steps


def transfer_line(carried: Sequence[Prompted]) -> tuple[float, float]:
    """(seconds, seconds per token) from the first token until decode has the KV, while it does nothing else."""
    lengths = sorted({one.num_tokens for one in carried})
    seconds = [median(one.parts["transfer_s"] for one in carried if one.num_tokens == n) for n in lengths]
    matrix = np.column_stack((np.ones(len(lengths)), lengths))
    (constant_s, per_token_s), _ = nnls(matrix, np.array(seconds))
    return float(constant_s), float(per_token_s)


def transfers_beside(carried: Sequence[tuple[Sequence[Prompted], Decoded]], per_token_s: float) -> tuple[float, float]:
    """(latency, turn) in seconds: from the first token until a decode worker that computes could take the KV of a short
    prompt, and how much longer it takes for each transfer at the same time, itself included.

    The worker takes KV between two steps: half of one passes before, on average. Prompts of one step are sent together.
    """
    together: list[int] = []
    seconds: list[float] = []
    for prompted, decoded in carried:
        for one in prompted:
            together.append(sum(abs(one.ended_s - other.ended_s) < _SAME_STEP_S for other in prompted))
            seconds.append(one.parts["transfer_s"] - per_token_s * one.num_tokens - decoded.step_s / 2)
    matrix = np.column_stack((np.ones(len(seconds)), together))
    (latency_s, turn_s), _ = nnls(matrix, np.array(seconds))
    return float(latency_s), float(turn_s)
