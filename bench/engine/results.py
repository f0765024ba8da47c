"""What the engine benchmark measures, what the machine could do at most, and the table of both."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import geometric_mean, median

from bench.engine.peers import Peer

OWN_ENGINE = "tandem"
_DECODE_PROMPT_TOKENS, _DECODE_STEPS = 240, 32  # a mean context of 256


@dataclass(frozen=True, slots=True)
class EngineCell:
    """One measurement: a prompt of `tokens`, or decode steps of `batch` sequences."""

    phase: str
    tokens: int = 0
    batch: int = 1

    @property
    def name(self) -> str:
        return f"prefill {self.tokens}" if self.phase == "prefill" else f"decode b={self.batch}"

    def measure(self, peer: Peer, round_number: int) -> float:
        """Tokens per second. Raises PeerError."""
        if self.phase == "prefill":
            return self.tokens / peer.ask(do="prefill", tokens=self.tokens, seed=round_number)["seconds"]
        answer = peer.ask(do="decode", batch=self.batch, prompt=_DECODE_PROMPT_TOKENS, steps=_DECODE_STEPS)
        return self.batch * _DECODE_STEPS / answer["seconds"]


CELLS = (
    EngineCell("prefill", tokens=512),
    EngineCell("prefill", tokens=2048),
    EngineCell("decode", batch=1),
    EngineCell("decode", batch=8),
    EngineCell("decode", batch=32),
)


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """Of the machine with the run's number of threads, measured in the same run."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class CellResult:
    """All rounds of one cell, in tokens/s by engine. `ceiling`: the most tokens/s that the machine allows."""

    model: str
    threads: int
    cell: EngineCell
    rounds: dict[str, list[float]]
    bound: str = ""
    ceiling: float = 0.0

    def median(self, engine: str) -> float | None:
        return median(self.rounds[engine]) if self.rounds.get(engine) else None

    def ratio(self, engine: str) -> float | None:
        """Tandem's tokens/s divided by those of `engine`."""
        own, other = self.median(OWN_ENGINE), self.median(engine)
        return own / other if own and other else None


def with_ceiling(result: CellResult, shape: dict[str, int], limits: MachineLimits) -> CellResult:
    """With the most tokens/s that memory and multipliers allow, and which of the two bounds them.

    Decode reads all weights (bf16; only rows of the embedding) and the sequences' KV in every step. A step takes at
    least the time of its bytes and at least the time of its multiplications.
    """
    hidden, layers, vocab = shape["hidden_size"], shape["num_hidden_layers"], shape["vocab_size"]
    kv_size, inner = shape["num_key_value_heads"] * shape["head_dim"], shape["intermediate_size"]
    q_size = shape["num_attention_heads"] * shape["head_dim"]
    in_layers = layers * (hidden * (q_size + 2 * kv_size) + q_size * hidden + 3 * hidden * inner)
    head = hidden * vocab
    cell = result.cell
    if cell.phase == "prefill":
        tokens = cell.tokens
        flops = 2 * in_layers * tokens + 2 * head + 4 * layers * q_size * tokens * (tokens + 1) // 2
        num_bytes = 2 * (in_layers + head)
    else:
        tokens = cell.batch
        context = _DECODE_PROMPT_TOKENS + _DECODE_STEPS // 2
        flops = tokens * (2 * (in_layers + head) + 4 * layers * q_size * context)
        num_bytes = 2 * (in_layers + head) + 2 * tokens * layers * 2 * kv_size * context
    memory_s, multiply_s = num_bytes / limits.bytes_per_s, flops / limits.flops_per_s
    bound = "memory" if memory_s > multiply_s else "multipliers"
    return replace(result, bound=bound, ceiling=tokens / max(memory_s, multiply_s))


def table(results: Sequence[CellResult], names: Sequence[str]) -> Iterator[str]:
    """Medians, with the rounds' range in brackets; Tandem's ratio to each engine; the bound of the cell."""
    others = [name for name in names if name != OWN_ENGINE]
    yield (
        "| cell | "
        + " | ".join([*names, *(f"{OWN_ENGINE} / {name}" for name in others), "bound by", "share of it"])
        + " |"
    )
    yield "|---" * (len(names) + len(others) + 3) + "|"
    for result in results:
        cells = []
        for name in names:
            rates = result.rounds[name]
            cells.append(f"{median(rates):.0f} ({min(rates):.0f}-{max(rates):.0f})" if rates else "-")
        cells += [f"{ratio:.2f}" if (ratio := result.ratio(name)) else "-" for name in others]
        own = result.median(OWN_ENGINE)
        cells += [result.bound, f"{own / result.ceiling:.0%}" if own else "-"]
        yield f"| {result.model} {result.threads}t {result.cell.name} | " + " | ".join(cells) + " |"


def mean_ratio(results: Sequence[CellResult], name: str) -> float | None:
    ratios = [ratio for result in results if (ratio := result.ratio(name))]
    return geometric_mean(ratios) if ratios else None


def summary(results: Sequence[CellResult], names: Sequence[str], starts: dict[str, float]) -> dict[str, object]:
    return {
        "cells": [
            {
                "model": result.model,
                "threads": result.threads,
                "cell": result.cell.name,
                "tokens_per_s": result.rounds,
                "bound": result.bound,
                "ceiling_tokens_per_s": result.ceiling,
            }
            for result in results
        ],
        "geometric_mean_ratio": {name: mean_ratio(results, name) for name in names if name != OWN_ENGINE},
        "start_s": starts,
    }
