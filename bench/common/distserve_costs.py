"""A cost source from published latency coefficients: DistServe's fits of OPT on A100s (OSDI 2024, Apache-2.0).

They reproduce the simulations that DistServe's authors compared with their cluster: OPT-13B on tp 1, 2, 4 and OPT-66B
on tp 2, 3, 4, 8, on A100-80GB-SXM4, for prompts of at most 2048 tokens.
"""

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from tandem.core.cost_model import StepCost, StepLoad
from tandem.core.model_shape import ModelShape
from tandem.core.parallel import ParallelShape
from tandem.placement.costs.models import model_shape

DistServeEngine = Literal["distserve", "vllm"]
DEVICE = "A100-80GB-SXM4"
_COEFFICIENTS = Path(__file__).with_name("distserve_a100_coefficients.csv")

_LARGE_DECODE_BATCH = 95  # sequences; larger batches have their own coefficients
_STAGE_HAND_OFF_S = 1e-3
_RAY_S, _RAY_PER_TOKEN_S = 2e-3, 1e-7

_MEMORY_BYTES = 84.99061e9  # the table of all shapes allows 84.990606e9 to 84.990627e9 bytes
_MEMORY_SHARE, _RUNTIME_SHARE = 0.95, 0.01
_BLOCK_TOKENS = 16
_POSITIONS = 2048


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Seconds. A prefill takes constant + per_token * sum(l) + quadratic * sum(l^2) over its prompts' lengths l; a
    decode step constant + per_token * context tokens + per_sequence * sequences."""

    constant_s: float
    per_token_s: float
    quadratic_s: float = 0.0
    per_sequence_s: float = 0.0


@dataclass(frozen=True, slots=True)
class DistServeCost:
    """The duration of a step in DistServe's simulator.

    Every stage of a pipeline takes its share of the fitted time; in prefill it also takes 1 ms for each stage of the
    pipeline. The first stage adds the overhead of Ray, unless `ray_overhead` is off. A decode step is a round of pp
    micro-batches.
    """

    prefill: Coefficients
    small_decode: Coefficients
    large_decode: Coefficients
    pp: int = 1
    ray_overhead: bool = True

    def step(self, load: StepLoad) -> StepCost:
        """Prompts and decoding sequences in one step cost the sum of both: the engine did not mix them."""
        linear = attention = kv_read = pipeline = overhead = interval = 0.0
        if load.prefill_tokens:
            fit = self.prefill
            linear = fit.constant_s + fit.per_token_s * load.prefill_tokens
            attention = fit.quadratic_s * (2 * load.prefill_pairs - load.prefill_tokens)
            stage_hand_off = _STAGE_HAND_OFF_S * self.pp
            pipeline = stage_hand_off * self.pp
            overhead = self._ray_s(1, load.prefill_tokens)
            interval = (linear + attention) / self.pp + stage_hand_off + overhead
        if load.decode_sequences:
            base, per_kv_token = self._decode_terms(load.decode_sequences)
            decode_overhead = self._ray_s(min(self.pp, load.decode_sequences), load.decode_kv_tokens)
            linear += base
            kv_read = per_kv_token * load.decode_kv_tokens
            overhead += decode_overhead
            interval += base + kv_read + decode_overhead
        return StepCost(
            linear_s=linear,
            attention_s=attention,
            kv_read_s=kv_read,
            pipeline_s=pipeline,
            overhead_s=overhead,
            interval_s=interval,
        )

    def decode_coefficients(self, sequences: int) -> tuple[float, float]:
        base, per_kv_token = self._decode_terms(sequences)
        ray_base, ray_per_token = (_RAY_S * min(self.pp, sequences), _RAY_PER_TOKEN_S) if self.ray_overhead else (0, 0)
        return base + ray_base, per_kv_token + ray_per_token

    def _decode_terms(self, sequences: int) -> tuple[float, float]:
        """A round's fixed seconds and seconds per KV token. Each micro-batch has a share of the sequences and their KV
        and passes all stages."""
        micro_batch = sequences / min(self.pp, sequences)
        fit = self.large_decode if micro_batch >= _LARGE_DECODE_BATCH else self.small_decode
        return fit.constant_s + fit.per_sequence_s * micro_batch, fit.per_token_s * micro_batch / sequences

    def _ray_s(self, batches: int, tokens: int) -> float:
        return _RAY_S * batches + _RAY_PER_TOKEN_S * tokens if self.ray_overhead else 0.0


class DistServeSource:
    """`model` is OPT-13B, OPT-66B, or OPT-175B (only its memory is known). `engine`: the one whose times were fitted,
    DistServe's own or the baseline vLLM 0.2.3."""

    __slots__ = ("_engine", "_model", "_ray_overhead")

    def __init__(self, model: str, engine: DistServeEngine = "distserve", *, ray_overhead: bool = True) -> None:
        """Raises ConfigError for an unknown model."""
        self._model = model_shape(model)
        self._engine = engine
        self._ray_overhead = ray_overhead

    def cost_model(self, device: str, shape: ParallelShape) -> DistServeCost | None:
        fits = _coefficients().get((self._engine, self._model.name, shape.tp))
        if fits is None or device != DEVICE or not _is_legal(self._model, shape):
            return None
        return DistServeCost(*fits, pp=shape.pp, ray_overhead=self._ray_overhead)

    def kv_tokens(self, device: str, shape: ParallelShape) -> int:
        """By DistServe's formula for OPT: complete embeddings on every rank, 95 % of the memory used."""
        if device != DEVICE or not _is_legal(self._model, shape):
            return 0
        model, layers = self._model, self._model.num_layers // shape.pp
        hidden = model.hidden_size
        tables = hidden * (model.vocab_size + _POSITIONS)
        weights = model.weight_bytes * (tables + 12 * layers * hidden * hidden / shape.tp + 5 * layers * hidden)
        free = (_MEMORY_SHARE - _RUNTIME_SHARE) * _MEMORY_BYTES - weights
        block_bytes = model.kv_bytes_per_token_and_rank(shape) * _BLOCK_TOKENS
        return max(0, int(free // block_bytes)) * _BLOCK_TOKENS

    @property
    def error(self) -> float:
        """Its authors give none."""
        return float("nan")


def _is_legal(model: ModelShape, shape: ParallelShape) -> bool:
    return model.allows(shape) and model.num_layers % shape.pp == 0


@cache
def _coefficients() -> dict[tuple[str, str, int], tuple[Coefficients, Coefficients, Coefficients]]:
    """(engine, model, tp) -> prefill, decode of small batches, decode of large ones."""
    rows: dict[tuple[str, str, int], dict[str, Coefficients]] = {}
    with _COEFFICIENTS.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            key = row["engine"], row["model"].removeprefix("facebook/opt-").upper(), int(row["tp"])
            constant, per_token, last = (float(row[name]) / 1e3 for name in ("a_ms", "b", "c"))
            is_prefill = row["phase"] == "prefill"
            rows.setdefault((key[0], f"OPT-{key[1]}", key[2]), {})[row["phase"]] = (
                Coefficients(constant, per_token, quadratic_s=last)
                if is_prefill
                else Coefficients(constant, per_token, per_sequence_s=last)
            )
    return {key: (fits["prefill"], fits["decoding_smallbs"], fits["decoding_largebs"]) for key, fits in rows.items()}
