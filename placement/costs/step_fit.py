"""A fit of measured steps, and the cost model that answers from it.

A step's time is the sum of terms that are each linear in what was fitted: linear layers by the number of rows (straight
lines between knots, since on a CPU the cost of a row falls in steps from memory-bound to compute-bound), attention by
its pairs, reading KV by its tokens (a slope for each batch size), drawing by the tokens drawn. So decode is affine in
the KV that it reads. Coefficients are never negative. What was held out of the fit tells its error.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, model_validator

from tandem.core.cost_model import StepCost, StepLoad
from tandem.core.frozen_model import FrozenModel
from tandem.placement.costs.rank_messages import MessageCosts
from tandem.placement.costs.serving import ServedStep, ServingCosts
from tandem.scheduling.batch_composer import MIN_GROUP

Knots = tuple[tuple[int, float], ...]
"""(count, value) in ascending order of count: straight lines between, the last line goes on, the first value before."""


class Measurement(FrozenModel):
    """One cell of the grid: a step's load (see `core.cost_model.StepLoad`) and its time, the median of `rounds`."""

    prefill_tokens: int = Field(default=0, ge=0)
    prefill_sequences: int = Field(default=0, ge=0)
    prefill_pairs: int = Field(default=0, ge=0)
    prefill_kv_tokens: int = Field(default=0, ge=0)
    decode_sequences: int = Field(default=0, ge=0)
    decode_kv_tokens: int = Field(default=0, ge=0)
    sampled: int = Field(default=0, ge=0)
    seconds: float = Field(gt=0)
    rounds: int = Field(default=1, ge=1)
    held_out: bool = Field(default=False, description="Not fitted; the error is of these")

    @property
    def load(self) -> StepLoad:
        return StepLoad(**self.model_dump(exclude={"seconds", "rounds", "held_out"}))


class Terms(FrozenModel):
    """The fit, in seconds. `kv_read` is by sequences in the batch, per token of KV."""

    linear: Knots = Field(min_length=1, description="By rows: prompt tokens and decoding sequences together")
    attention_per_pair: float = Field(ge=0)
    kv_read: Knots = Field(min_length=1)
    kv_per_sequence: float = Field(ge=0)
    head: float = Field(ge=0, description="Of a step that draws at all")
    head_per_sampled: float = Field(ge=0)

    @model_validator(mode="after")
    def _check_knots(self) -> "Terms":
        for knots in (self.linear, self.kv_read):
            counts = [count for count, _ in knots]
            if counts != sorted(set(counts)) or min(value for _, value in knots) < 0:
                raise ValueError("knots must ascend, and their values be at least 0")
        return self


class FitError(FrozenModel):
    """Relative, absolute values, of what was held out; `fitted_median` is of the rest."""

    model_config = ConfigDict(allow_inf_nan=True)

    median: float
    mean: float
    worst: float
    fitted_median: float


class CalibratedCost:
    """A `core.cost_model.StagedCost` of one instance.

    `terms` are of steps that are computed one at a time. Of an instance with several stages, `following` are of steps
    that follow each other, one in each stage: the time from the end of one to the end of the next. Without them its
    stages count as if they computed one step at a time. The `messages` of several ranks are part of what was fitted by
    the number of rows; they are named apart from it.
    """

    __slots__ = ("_alone", "_following", "_messages", "_num_stages")

    def __init__(
        self,
        terms: Terms,
        serving: ServingCosts | None = None,
        *,
        contended: float = 1.0,
        messages: MessageCosts | None = None,
        num_stages: int = 1,
        following: Terms | None = None,
    ) -> None:
        """`contended`: share of the time during which the machine's other workers compute. 1 is never optimistic."""
        serving = serving or ServingCosts()
        served = serving.prefill(contended), serving.decode(contended)
        self._alone = _ServedTerms(terms, *served)
        self._following = None if following is None or num_stages == 1 else _ServedTerms(following, *served)
        self._messages = messages
        self._num_stages = num_stages

    @property
    def num_stages(self) -> int:
        """How many steps are computed at once."""
        return 1 if self._following is None else self._num_stages

    def step(self, load: StepLoad) -> StepCost:
        if self._following is None or not load.decode_sequences:
            return self.one_step(load)
        groups = self._groups(load.decode_sequences)
        one = self.one_step(_part(load, groups))
        if not load.prefill_tokens:
            base_s, per_token_s = self.decode_coefficients(load.decode_sequences)
            total_s = base_s + per_token_s * load.decode_kv_tokens
        else:
            total_s = max(one.total_s, groups * one.interval_s)
        share = total_s / one.total_s
        return StepCost(**{name: share * seconds for name, seconds in one.terms().items()}, interval_s=total_s)

    def one_step(self, load: StepLoad) -> StepCost:
        if load.tokens == 0:
            return StepCost()
        times = self._alone.times(load)
        sums_s, sends_s = (0.0, 0.0) if self._messages is None else self._messages.seconds(load.tokens)
        if sums_s + sends_s > times.rows_s:  # measured apart from steps, at a time when the machine was slower
            share = times.rows_s / (sums_s + sends_s)
            sums_s, sends_s = share * sums_s, share * sends_s
        total_s = interval_s = sum(times)
        if self._following is not None:
            interval_s = min(total_s, max(sum(self._following.times(load)), total_s / self._num_stages))
        return StepCost(
            linear_s=times.rows_s - sums_s - sends_s,
            attention_s=times.attention_s,
            kv_read_s=times.kv_read_s,
            collective_s=sums_s,
            pipeline_s=sends_s,
            head_s=times.head_s,
            overhead_s=times.overhead_s,
            interval_s=interval_s,
        )

    def decode_coefficients(self, sequences: int) -> tuple[float, float]:
        """Of a round, of which each sequence is in one step: as long as that step takes through all stages, or as all
        steps take that follow each other, whichever is longer."""
        if self._following is None:
            return self._alone.decode_line(sequences)
        groups = self._groups(sequences)
        base_s, per_token_s = self._alone.decode_line(sequences / groups)
        if groups == 1:
            return base_s, per_token_s
        next_base_s, next_per_token_s = self._following.decode_line(sequences / groups)
        return (
            max(base_s, groups * min(base_s, next_base_s)),
            max(per_token_s / groups, min(per_token_s, next_per_token_s)),
        )

    def _groups(self, sequences: int) -> int:
        """How many steps the scheduler divides so many decoding sequences into."""
        of_step = max(-(-sequences // self._num_stages), min(sequences, MIN_GROUP))
        return -(-sequences // of_step)


class _StepTimes(NamedTuple):
    """Seconds of a step by cause."""

    rows_s: float
    attention_s: float
    kv_read_s: float
    head_s: float
    overhead_s: float


class _ServedTerms:
    """Terms as functions, with what serving adds to them."""

    __slots__ = ("_decode", "_kv_slope", "_linear", "_prefill", "_terms")

    def __init__(self, terms: Terms, prefill: ServedStep, decode: ServedStep) -> None:
        self._terms = terms
        self._prefill = prefill
        self._decode = decode
        self._linear = _Interpolation(terms.linear)
        self._kv_slope = _Interpolation(terms.kv_read)

    def times(self, load: StepLoad) -> _StepTimes:
        """Of a load that is not empty."""
        terms = self._terms
        served = self._prefill if load.prefill_tokens else self._decode
        factor = served.factor_of(load.decode_sequences)
        kv_read_s = 0.0
        if load.decode_sequences:
            slope = self._kv_slope(load.decode_sequences)
            kv_read_s = slope * load.decode_kv_tokens + terms.kv_per_sequence * load.decode_sequences
        return _StepTimes(
            rows_s=factor * self._linear(load.tokens),
            attention_s=factor * terms.attention_per_pair * load.prefill_pairs,
            kv_read_s=kv_read_s,
            head_s=factor * (terms.head + terms.head_per_sampled * load.sampled) if load.sampled else 0.0,
            overhead_s=served.constant_s,
        )

    def decode_line(self, sequences: float) -> tuple[float, float]:
        """(seconds, seconds per token of KV read) of a step in which so many decode; the number may be a mean."""
        terms, factor = self._terms, self._decode.factor_of(sequences)
        computed_s = self._linear(sequences) + terms.head + terms.head_per_sampled * sequences
        base_s = factor * computed_s + terms.kv_per_sequence * sequences + self._decode.constant_s
        return base_s, self._kv_slope(sequences)


def _part(load: StepLoad, count: int) -> StepLoad:
    """The load of one of `count` steps that share it."""
    return load if count == 1 else StepLoad(**{name: -(-value // count) for name, value in asdict(load).items()})


def fit_terms(measurements: Sequence[Measurement]) -> Terms:
    """Least squares of relative errors, over what is not held out.

    Every number of rows, and every decode batch, that was measured and not held out becomes a knot. More rows never
    take less. Raises ValueError if there is nothing to fit prefill or decode with.
    """
    from scipy.optimize import nnls  # a third of a second, which commands that only read a calibration do not wait

    fitted = [one for one in measurements if not one.held_out]
    rows = sorted({one.load.tokens for one in fitted if not (one.prefill_tokens and one.decode_sequences)})
    batches = sorted({one.decode_sequences for one in fitted if one.decode_sequences and not one.prefill_tokens})
    if not batches or not any(one.prefill_tokens for one in fitted):
        raise ValueError("prefill and decode must both be measured")
    matrix = np.array([_row(one.load, rows, batches) for one in fitted])
    seconds = np.array([one.seconds for one in fitted])
    matrix /= seconds[:, None]
    scale = np.linalg.norm(matrix, axis=0)  # columns differ by ten orders of magnitude: pairs and steps
    scale[scale == 0] = 1.0
    found, _ = nnls(matrix / scale, np.ones(len(fitted)))
    values = (found / scale).tolist()
    linear = np.cumsum(values[: len(rows)]).tolist()
    slopes = values[len(rows) : len(rows) + len(batches)]
    pair, sequence, head, sampled = values[len(rows) + len(batches) :]
    return Terms(
        linear=tuple(zip(rows, linear, strict=True)),
        attention_per_pair=pair,
        kv_read=tuple(zip(batches, slopes, strict=True)),
        kv_per_sequence=sequence,
        head=head,
        head_per_sampled=sampled,
    )


def fit_error(terms: Terms, measurements: Sequence[Measurement]) -> FitError:
    """Of the engine by itself. NaN where nothing was held out."""
    cost = CalibratedCost(terms)
    errors: dict[bool, list[float]] = {False: [], True: []}
    for one in measurements:
        errors[one.held_out].append(abs(cost.step(one.load).total_s / one.seconds - 1))
    held = np.array(errors[True] or [np.nan])
    return FitError(
        median=float(np.median(held)),
        mean=float(held.mean()),
        worst=float(held.max()),
        fitted_median=float(np.median(errors[False] or [np.nan])),
    )


class _Interpolation:
    """Knots as a function."""

    __slots__ = ("_counts", "_slopes", "_values")

    def __init__(self, knots: Knots) -> None:
        self._counts = [count for count, _ in knots]
        self._values = [value for _, value in knots]
        self._slopes = [
            (knots[i + 1][1] - knots[i][1]) / (knots[i + 1][0] - knots[i][0]) for i in range(len(knots) - 1)
        ] or [0.0]

    def __call__(self, count: float) -> float:
        if count <= self._counts[0]:
            return self._values[0]
        place = min(bisect_right(self._counts, count) - 1, len(self._slopes) - 1)
        return max(0.0, self._values[place] + self._slopes[place] * (count - self._counts[place]))


def _row(load: StepLoad, rows: Sequence[int], batches: Sequence[int]) -> list[float]:
    """What each coefficient is multiplied with in a step of this load. Of linear layers, a coefficient is by how much
    its knot lies above the one before."""
    steps_up = np.cumsum(_hats(load.tokens, rows)[::-1])[::-1]
    slopes = [0.0] * len(batches)
    if load.decode_sequences:
        slopes = (_hats(load.decode_sequences, batches) * load.decode_kv_tokens).tolist()
    others = (load.prefill_pairs, load.decode_sequences, float(load.sampled > 0), load.sampled)
    return [*steps_up.tolist(), *slopes, *map(float, others)]


def _hats(count: int, knots: Sequence[int]) -> npt.NDArray[np.float64]:
    """The weight of each knot in the interpolation at `count`."""
    return np.array([np.interp(count, knots, one) for one in np.eye(len(knots))], dtype=np.float64)
