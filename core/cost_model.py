"""What a step costs, as a sum whose terms have names, so that one can ask why a plan is slow.

A cost model belongs to one model on one device in one parallel shape. The planner, the simulator and the router ask
the same ones. Where the numbers come from (a roofline, a measured calibration, published coefficients) is the
business of the classes that implement `CostModel`.
"""

from dataclasses import dataclass, fields
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What one step computes, reduced to the sums that time follows from.

    Prefill: `prefill_tokens` are computed for `prefill_sequences` prompts. Each of them attends to the tokens before
    it and to itself: `prefill_pairs` such pairs of query and key. `prefill_kv_tokens` is how many tokens' KV these
    chunks end with. Decode: `decode_sequences` compute one token each, over `decode_kv_tokens` tokens of KV together,
    the new ones included. `sampled` tokens are drawn (a prompt's chunk that is not its last draws none).
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
        """Whole prompts, nothing cached."""
        return cls(
            prefill_tokens=sum(lengths),
            prefill_sequences=len(lengths),
            prefill_pairs=sum(pairs(0, length) for length in lengths),
            prefill_kv_tokens=sum(lengths),
            sampled=len(lengths),
        )

    @classmethod
    def of_decode(cls, sequences: int, kv_tokens: int) -> "StepLoad":
        return cls(decode_sequences=sequences, decode_kv_tokens=kv_tokens, sampled=sequences)

    @property
    def tokens(self) -> int:
        """Rows of the linear layers' input."""
        return self.prefill_tokens + self.decode_sequences


def pairs(start: int, num_tokens: int) -> int:
    """Pairs of query and key in causal attention of tokens `[start, start + num_tokens)`."""
    return num_tokens * start + num_tokens * (num_tokens + 1) // 2


@dataclass(frozen=True, slots=True)
class StepCost:
    """Seconds of one step, by cause; they sum to `total_s`, from the step's start to its tokens.

    `interval_s`: after how long the instance can start a step of other sequences. It is `total_s` on one stage and for
    decode (where all stages' micro-batches together are the step), and less for prefill through a pipeline.
    """

    linear_s: float = 0.0  # projections, MLP, experts
    attention_s: float = 0.0  # prompt tokens' attention
    kv_read_s: float = 0.0  # decoding tokens' attention
    collective_s: float = 0.0  # all-reduce of tp, all-to-all of experts
    pipeline_s: float = 0.0  # hand-off between stages
    head_s: float = 0.0  # embedding, logits, sampling
    overhead_s: float = 0.0  # launches, scheduling, Python
    interval_s: float = 0.0

    @property
    def total_s(self) -> float:
        return sum(self.terms().values())

    def terms(self) -> dict[str, float]:
        """Name of the term -> seconds."""
        return {name: getattr(self, name) for name in _TERMS}

    @property
    def bound(self) -> str:
        """The largest term's name, without its unit."""
        terms = self.terms()
        return max(terms, key=terms.__getitem__).removesuffix("_s")


_TERMS = tuple(field.name for field in fields(StepCost) if field.name != "interval_s")


class CostModel(Protocol):
    """Times of one instance. Pure and deterministic; every time is more than 0 for a load that is not empty."""

    def step(self, load: StepLoad) -> StepCost: ...

    def decode_line(self, sequences: int) -> tuple[float, float]:
        """(base_s, per_kv_token_s): a step of `sequences` decoding tokens over `n` tokens of KV takes base_s + n *
        per_kv_token_s. Equal to `step` of the same load: decode's cost must be affine in the KV that it reads, so
        that a run of steps has a closed form."""
        ...
