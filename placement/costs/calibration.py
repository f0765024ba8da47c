"""What `tandem profile` measured of one model on the device at hand, and the cost model fitted to it.

A step's time is the sum of terms that are each linear in what was fitted: linear layers by the number of rows (straight
lines between knots, since on a CPU the cost of a row falls in steps from memory-bound to compute-bound), attention by
its pairs, reading KV by its tokens (a slope for each batch size), drawing by the tokens drawn. So decode is affine in
the KV that it reads. Coefficients are never negative. What was held out of the fit tells its error.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from tandem.core.config_file import load_config
from tandem.core.cost_model import StepCost, StepLoad
from tandem.core.errors import ConfigError
from tandem.core.frozen_model import FrozenModel
from tandem.core.parallel import ParallelShape
from tandem.placement.costs.serving import PathCosts, ServingCosts
from tandem.placement.simulator.deployment import NetworkSpec, RouterSpec

Knots = tuple[tuple[int, float], ...]
"""(count, value) in ascending order of count: straight lines between, the last line goes on, the first value before."""

_ONE_RANK = ParallelShape(1, 1)


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


class FitError(FrozenModel):
    """Relative, absolute values, of what was held out; `fitted_median` is of the rest."""

    median: float
    mean: float
    worst: float
    fitted_median: float


class Calibration(FrozenModel):
    """The file that `tandem profile` writes: of one model, in one dtype, on one device with a number of threads."""

    version: Literal[1] = 1
    measured_on: date
    device: str = Field(description="As the machine calls it, e.g. the CPU's model name")
    cores: int = Field(ge=1)
    model: str
    weights_hash: str = Field(description="Of the checkpoint's weights")
    dtype: str
    ops: str
    threads: int = Field(ge=0, description="Of an instance")
    kv_bytes_per_token: float = Field(gt=0)
    kv_memory_bytes: int = Field(gt=0, description="KV pool of an instance")
    terms: Terms
    error: FitError
    serving: ServingCosts = ServingCosts()
    request_path: PathCosts | None = Field(default=None, description="None: no cluster was measured")
    measurements: tuple[Measurement, ...] = ()

    @model_validator(mode="after")
    def _check_knots(self) -> "Calibration":
        for knots in (self.terms.linear, self.terms.kv_read):
            counts = [count for count, _ in knots]
            if counts != sorted(set(counts)) or min(value for _, value in knots) < 0:
                raise ValueError("knots must ascend, and their values be at least 0")
        return self

    def router_spec(self) -> RouterSpec:
        """Of the cluster that was measured; free of cost if none was."""
        return RouterSpec() if self.request_path is None else self.request_path.router_spec()

    def network_spec(self, *, contended: float = 1.0) -> NetworkSpec:
        """All instances on this machine. `contended`: share of the time during which they compute."""
        if self.request_path is None:
            return NetworkSpec(self.kv_bytes_per_token)
        return self.request_path.network_spec(self.kv_bytes_per_token, contended)


def load_calibration(path: Path) -> Calibration:
    """Raises ConfigError."""
    return load_config(path, Calibration)


class CalibratedCost:
    """A `core.cost_model.CostModel` of one instance with one rank."""

    __slots__ = ("_decode", "_kv_slope", "_linear", "_prefill", "_terms")

    def __init__(self, terms: Terms, serving: ServingCosts | None = None, *, contended: float = 1.0) -> None:
        """`contended`: share of the time during which the machine's other workers compute. 1 is never optimistic."""
        serving = serving or ServingCosts()
        self._terms = terms
        self._prefill = serving.prefill(contended)
        self._decode = serving.decode(contended)
        self._linear = _Interpolation(terms.linear)
        self._kv_slope = _Interpolation(terms.kv_read)

    def step(self, load: StepLoad) -> StepCost:
        if load.tokens == 0:
            return StepCost()
        terms = self._terms
        served = self._prefill if load.prefill_tokens else self._decode
        factor = served.factor
        linear_s = factor * self._linear(load.tokens)
        attention_s = factor * terms.attention_per_pair * load.prefill_pairs
        kv_read_s = 0.0
        if load.decode_sequences:
            slope = self._kv_slope(load.decode_sequences)
            kv_read_s = slope * load.decode_kv_tokens + terms.kv_per_sequence * load.decode_sequences
        head_s = factor * (terms.head + terms.head_per_sampled * load.sampled) if load.sampled else 0.0
        return StepCost(
            linear_s=linear_s,
            attention_s=attention_s,
            kv_read_s=kv_read_s,
            head_s=head_s,
            overhead_s=served.constant_s,
            interval_s=linear_s + attention_s + kv_read_s + head_s + served.constant_s,
        )

    def decode_coefficients(self, sequences: int) -> tuple[float, float]:
        base_s = self.step(StepLoad.of_decode(sequences, 0)).total_s
        return base_s, self._kv_slope(sequences)


class CalibratedSource:
    """A `placement.costs.cost_source.CostSource`: devices by their names in the cluster, each with its calibration.

    Only whole models on one rank were measured, so there is no other shape. `kv_memory_bytes`: of one instance's KV
    pool; None takes the size that was measured with.
    """

    def __init__(self, calibrations: Mapping[str, Calibration], *, kv_memory_bytes: int | None = None) -> None:
        """Raises ConfigError if the calibrations are of different models."""
        models = {calibration.model for calibration in calibrations.values()}
        if len(models) > 1:
            raise ConfigError(f"the calibrations are of different models: {', '.join(sorted(models))}")
        self._calibrations = dict(calibrations)
        self._kv_memory_bytes = kv_memory_bytes
        self._costs = {name: CalibratedCost(one.terms, one.serving) for name, one in calibrations.items()}

    def cost_model(self, device: str, shape: ParallelShape) -> CalibratedCost | None:
        return self._costs.get(device) if shape == _ONE_RANK else None

    def kv_tokens(self, device: str, shape: ParallelShape) -> int:
        if device not in self._calibrations or shape != _ONE_RANK:
            return 0
        calibration = self._calibrations[device]
        return int((self._kv_memory_bytes or calibration.kv_memory_bytes) // calibration.kv_bytes_per_token)

    @property
    def error(self) -> float:
        """The worst calibration's median."""
        return max((one.error.median for one in self._calibrations.values()), default=float("nan"))


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

    def __call__(self, count: int) -> float:
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
