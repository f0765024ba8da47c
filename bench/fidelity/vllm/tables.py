"""A cost model from the layer tables that LLMServingSim measured inside vLLM 0.19.

The tables have the times of one layer's operations on one GPU: dense layers by tokens, attention by (prompt chunk, its
history, decoding sequences, their history), logits and sampler by sequences. They have no collectives between two GPUs,
which are parameters here.
"""

import csv
import gzip
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from tandem.core.cost_model import StepCost, StepLoad
from tandem.core.model_shape import ModelShape
from tandem.placement.workload.requests import Floats

_PER_LAYER = {"qkv_proj": 1, "o_proj": 1, "gate_up_proj": 1, "down_proj": 1, "act_fn": 1, "rotary_emb": 1}
_PER_LAYER |= {"layernorm": 2, "qk_norm": 1}
_ONCE = {"embedding": 1, "final_layernorm": 1}


@dataclass(frozen=True, slots=True)
class TableCurve:
    """Seconds as a function of a count, linear between the measured points and beyond the last."""

    x: Floats
    y_s: Floats

    @classmethod
    def of(cls, points: Mapping[float, float]) -> "TableCurve":
        xs = sorted(points)
        return cls(np.array(xs, dtype=np.float64), np.array([points[x] for x in xs], dtype=np.float64) * 1e-6)

    def __call__(self, x: float) -> float:
        if x <= 0:
            return 0.0
        if x > self.x[-1]:
            slope = (self.y_s[-1] - self.y_s[-2]) / (self.x[-1] - self.x[-2])
            return float(self.y_s[-1] + slope * (x - self.x[-1]))
        return float(np.interp(x, self.x, self.y_s))


@dataclass(frozen=True, slots=True)
class AttentionFit:
    """One layer's attention, fitted to the table by relative error.

    Prompt chunks: a sum over tokens, pairs and KV read. Decoding sequences: a line in their KV for each measured batch,
    and another line for steps that also have prompt chunks, where the kernel splits a sequence's KV over fewer thread
    blocks and reads it at half the speed.
    """

    prefill_s: tuple[float, ...]  # constant, per token, per pair, per token of history
    alone: "DecodeLines"
    mixed: "DecodeLines"


@dataclass(frozen=True, slots=True)
class DecodeLines:
    """Seconds of `n` decoding sequences: base_s + per_kv_token_s * (KV tokens of all), interpolated over n."""

    sequences: Floats
    base_s: Floats
    per_kv_token_s: Floats

    def at(self, sequences: int) -> tuple[float, float]:
        return (
            float(np.interp(sequences, self.sequences, self.base_s)),
            float(np.interp(sequences, self.sequences, self.per_kv_token_s)),
        )


@dataclass(frozen=True)
class VllmTableModel:
    """A `CostModel` of one model on one type of GPU at one tp, with two all-reduces in a layer (0 s on one GPU)."""

    shape: ModelShape
    layers: TableCurve
    once: TableCurve
    head: TableCurve
    attention: AttentionFit
    all_reduce_s_per_byte: float = 0.0
    all_reduce_latency_s: float = 0.0
    _lines: dict[int, tuple[float, float]] = field(default_factory=dict)

    def step(self, load: StepLoad) -> StepCost:
        fit, num_layers = self.attention, self.shape.num_layers
        attention_s = kv_read_s = 0.0
        if load.prefill_tokens:
            constant, per_token, per_pair, per_history = fit.prefill_s
            history = load.prefill_kv_tokens - load.prefill_tokens
            attention_s = constant + per_token * load.prefill_tokens + per_pair * load.prefill_pairs
            attention_s += per_history * history
        if load.decode_sequences:
            lines = fit.mixed if load.prefill_tokens else fit.alone
            base_s, per_kv_token_s = lines.at(load.decode_sequences)
            kv_read_s = base_s + per_kv_token_s * load.decode_kv_tokens
        calls = 2 * num_layers
        bytes_per_call = load.tokens * self.shape.hidden_size * 2
        linear_s = self._linear_s(load.tokens)
        costs = StepCost(
            linear_s=linear_s,
            attention_s=num_layers * attention_s,
            kv_read_s=num_layers * kv_read_s,
            collective_s=calls * (self.all_reduce_latency_s + bytes_per_call * self.all_reduce_s_per_byte),
            head_s=self.head(load.sampled),
        )
        return StepCost(**costs.terms(), interval_s=costs.total_s)

    def decode_coefficients(self, sequences: int) -> tuple[float, float]:
        if sequences not in self._lines:
            base_s = self.step(StepLoad.of_decode(sequences, 0)).total_s
            self._lines[sequences] = (base_s, self.shape.num_layers * self.attention.alone.at(sequences)[1])
        return self._lines[sequences]

    def _linear_s(self, tokens: int) -> float:
        return self.shape.num_layers * self.layers(tokens) + self.once(tokens)


def read_vllm_tables(data: Path, hardware: str, shape: ModelShape, tp: int) -> VllmTableModel:
    """The model of `shape` from the tables in `data`/latency. Raises FileNotFoundError, or KeyError if it was not
    measured."""
    key = (hardware, shape.name, str(tp))
    dense: dict[str, dict[float, float]] = defaultdict(dict)
    for row in _rows(data / "latency" / "llmservingsim_dense_us.csv.gz", key):
        dense[row["layer"]][float(row["tokens"])] = float(row["time_us"])
    if "down_proj" not in dense:
        raise KeyError(f"the tables have no dense {shape.name} at tp {tp} on {hardware}")
    heads: dict[float, float] = defaultdict(float)
    for row in _rows(data / "latency" / "llmservingsim_per_sequence_us.csv.gz", key):
        heads[float(row["sequences"])] += float(row["time_us"])
    attention = [
        (
            float(r["prefill_chunk"]),
            float(r["kv_prefill"]),
            float(r["n_decode"]),
            float(r["kv_decode"]),
            float(r["time_us"]),
        )
        for r in _rows(data / "latency" / "llmservingsim_attention_us.csv.gz", key)
    ]
    return VllmTableModel(
        shape=shape,
        layers=_sum_of(dense, _PER_LAYER),
        once=_sum_of(dense, _ONCE),
        head=TableCurve.of(heads),
        attention=fit_attention(np.array(attention)),
    )


def fit_attention(table: npt.NDArray[np.float64]) -> AttentionFit:
    """`table`: rows of prefill_chunk, kv_prefill, n_decode, kv_decode, time_us."""
    chunk, history, sequences, context, time_us = table.T
    time_s = time_us * 1e-6
    alone = (sequences == 0) & (chunk > 0)
    pairs = chunk * history + chunk * (chunk + 1) / 2
    columns = np.stack([np.ones_like(chunk), chunk, pairs, history], axis=1)
    prefill = _fit_relative(columns[alone], time_s[alone], time_s[alone])
    usual = (context >= 256) & (context <= 4096) & (history <= 2048)  # the lengths of the requests
    decoding = (chunk == 0) & (sequences > 0) & usual
    mixed = (chunk >= 256) & (sequences > 0) & usual
    prompts_s = columns @ np.array(prefill)
    return AttentionFit(
        prefill_s=prefill,
        alone=_fit_lines(sequences[decoding], context[decoding], time_s[decoding], time_s[decoding]),
        mixed=_fit_lines(sequences[mixed], context[mixed], (time_s - prompts_s)[mixed], time_s[mixed]),
    )


def _fit_lines(sequences: Floats, context: Floats, time_s: Floats, total_s: Floats) -> DecodeLines:
    """One line for each number of sequences; errors are relative to `total_s`."""
    batches = np.unique(sequences)
    fits = []
    for batch in batches:
        rows = sequences == batch
        kv_tokens = batch * (context[rows] + 1)
        columns = np.stack([np.ones_like(kv_tokens), kv_tokens], axis=1)
        fits.append(_fit_relative(columns, time_s[rows], total_s[rows]))
    base_s, per_kv_token_s = np.array(fits).T
    return DecodeLines(batches, base_s, per_kv_token_s)


def _fit_relative(columns: Floats, time_s: Floats, total_s: Floats) -> tuple[float, ...]:
    """Least squares of the errors relative to `total_s`, with coefficients of at least 0."""
    solution, _ = nnls(columns / total_s[:, None], time_s / total_s)
    return tuple(float(value) for value in solution)


def _sum_of(dense: Mapping[str, Mapping[float, float]], counts: Mapping[str, int]) -> TableCurve:
    present = [name for name in counts if name in dense]
    tokens = sorted(set.intersection(*(set(dense[name]) for name in present)))
    return TableCurve.of({t: sum(counts[name] * dense[name][t] for name in present) for t in tokens})


@lru_cache(maxsize=4)
def _table(path: Path) -> tuple[dict[str, str], ...]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


def _rows(path: Path, key: tuple[str, str, str]) -> list[dict[str, str]]:
    return [row for row in _table(path) if (row["hardware"], row["model"], row["tp"]) == key]
