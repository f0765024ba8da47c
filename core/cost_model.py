"""The cost of one step, as a sum of named terms: the terms show why a plan is slow.

A cost model belongs to one model on one device in one parallel shape. Planner, simulator and router use the same cost
models. The classes that implement `CostModel` take their numbers from a roofline, a calibration or published
coefficients.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class StepLoad:
    """The work of one step, reduced to the sums that determine its time.

    Prefill: `prefill_tokens` tokens of `prefill_sequences` prompts are computed. Each token attends to the tokens
    before it and to itself; `prefill_pairs` counts these pairs of query and key. `prefill_kv_tokens` is the sum of the
    prompts' KV tokens at the end of the step. Decode: `decode_sequences` sequences compute one token each and read
    `decode_kv_tokens` tokens of KV in total, the new tokens included. `sampled` tokens are sampled; a chunk that does
    not end its prompt samples none.
    """

    prefill_tokens: int = 0
    prefill_sequences: int = 0
    prefill_pairs: int = 0
    prefill_kv_tokens: int = 0
    decode_sequences: int = 0
    decode_kv_tokens: int = 0
    sampled: int = 0

    @classmethod
    def of_prompts(cls, *lengths: int) -> "StepLoad":
        """Complete prompts without cached tokens."""
        return cls(
            prefill_tokens=sum(lengths),
            prefill_sequences=len(lengths),
            prefill_pairs=sum(attention_pairs(0, length) for length in lengths),
            prefill_kv_tokens=sum(lengths),
            sampled=len(lengths),
        )

    @classmethod
    def of_decode(cls, sequences: int, kv_tokens: int) -> "StepLoad":
        return cls(decode_sequences=sequences, decode_kv_tokens=kv_tokens, sampled=sequences)

    def beside_decode(self, sequences: int, kv_tokens: int) -> "StepLoad":
        """The same prompts beside decoding sequences; this load has none."""
        return replace(self, decode_sequences=sequences, decode_kv_tokens=kv_tokens, sampled=self.sampled + sequences)

    @property
    def tokens(self) -> int:
        """Rows of the linear layers' input."""
        return self.prefill_tokens + self.decode_sequences


def attention_pairs(start: int, num_tokens: int) -> int:
    """Pairs of query and key in causal attention of the tokens `[start, start + num_tokens)`."""
    return num_tokens * start + num_tokens * (num_tokens + 1) // 2


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of one step by cause. The terms sum to `total_s`, the time from the step's start to its tokens.

    `interval_s` is the time until the instance can start a step of other sequences. It equals `total_s` for one
    pipeline stage and for decode, where the micro-batches of all stages form one step. It is less than `total_s` for
    prefill through a pipeline.
    """

    linear_s: float = 0.0  # projections, MLP, experts
    attention_s: float = 0.0  # attention of prompt tokens
    kv_read_s: float = 0.0  # attention of decoding tokens
    collective_s: float = 0.0  # all-reduce of tp, all-to-all of experts
    pipeline_s: float = 0.0  # transfer of activations between stages
    head_s: float = 0.0  # embedding, logits, sampling
    overhead_s: float = 0.0  # kernel launches, scheduling, Python
    interval_s: float = 0.0

    @property
    def total_s(self) -> float:
        return (
            self.linear_s
            + self.attention_s
            + self.kv_read_s
            + self.collective_s
            + self.pipeline_s
            + self.head_s
            + self.overhead_s
        )

    def terms(self) -> dict[str, float]:
        """Name of the term -> seconds."""
        return {name: getattr(self, name) for name in COST_TERMS}


COST_TERMS = tuple(field.name for field in fields(StepCost) if field.name != "interval_s")
"""The names of `StepCost.terms`."""


class CostModel(Protocol):
    """Step times of one instance. Pure and deterministic; every time is above 0 for a load that is not empty."""

    def step(self, load: StepLoad) -> StepCost: ...

    def decode_coefficients(self, sequences: int) -> tuple[float, float]:
        """(base_s, per_kv_token_s): a decode step of `sequences` sequences over `n` tokens of KV takes base_s + n *
        per_kv_token_s. Equal to `step` of the same load. Decode cost is affine in the KV tokens, so the time of many
        equal steps has a closed form."""
        ...


@runtime_checkable
class StagedCost(CostModel, Protocol):
    """The cost model of an instance of several pipeline stages, each of which computes another step at a time.

    For it `step` of a load with decoding sequences is a round, after which each of them has one token more. A round
    consists of one or more steps, and `one_step` has their costs."""

    @property
    def num_stages(self) -> int: ...

    def one_step(self, load: StepLoad) -> StepCost:
        """The cost of a single step with this load. `total_s` is its time through all stages. `interval_s` is the time
        until an equal step after it could end, or begin: at least a `num_stages`-th of `total_s`."""
        ...


def staged(cost: CostModel) -> StagedCost | None:
    """The same cost model if it has several stages, else None."""
    return cost if isinstance(cost, StagedCost) and cost.num_stages > 1 else None


def following_s(steps: Iterable[StepCost]) -> float:
    """From the beginning of the first of these steps to the end of the last. Each begins when the one before has left
    the first stage, and takes its place in the last one."""
    free_s = ended_s = 0.0
    for step in steps:
        ended_s = max(free_s + step.total_s, ended_s + step.interval_s)
        free_s += step.interval_s
    return ended_s
