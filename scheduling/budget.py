"""Bounds of what an instance computes in a step. The roles of instances differ in these bounds only."""

from dataclasses import dataclass
from typing import Literal

from tandem.core.session import Role

Mixing = Literal["chunked", "slack", "prompt_first"]


@dataclass(frozen=True, slots=True)
class StepBudget:
    """Bounds of one step, and of admission.

    A prefill instance has a large `max_prefill_tokens` and decodes nothing; a decode instance has a small one; a
    colocated instance lies between.

    `max_batch` bounds the sequences that decode in one step, and the sequences that are admitted with a prompt to
    compute. `max_batch_tokens` bounds all tokens of a step, `max_prefill_tokens` its prompt tokens, and `max_queue` the
    waiting sequences.

    chunked       Every step takes a token of each decoding sequence first, then chunks of prompts into what is left of
                  the budget (Sarathi-Serve, OSDI '24; vLLM v1). Decoding never stalls.
    slack         As chunked, but with only as many prompt tokens as the slack of the decoding sequences allows (see
                  `scheduling.slack`). Without predicted step times it is the same as chunked.
    prompt_first  While prompts wait and fit, a step has whole prompts only: up to `max_prefill_tokens` together, or one
                  longer prompt. Otherwise a step has all decoding sequences (vLLM 0.2). Every prompt stalls decoding.

    A sequence is admitted if the pool has its blocks, the blocks by which all sequences may grow in the next
    `growth_horizon_tokens` tokens (or until their max_tokens), and a free share `watermark` beside these. The watermark
    does not apply to a sequence that would run alone. A longer horizon causes fewer preemptions, a shorter one admits
    more sequences.
    """

    max_batch: int
    max_batch_tokens: int
    max_prefill_tokens: int
    max_queue: int
    mixing: Mixing = "chunked"
    growth_horizon_tokens: int = 0
    watermark: float = 0.0

    def __post_init__(self) -> None:
        assert self.max_batch > 0
        assert 0 < self.max_prefill_tokens <= self.max_batch_tokens


PREFILL_BATCH_TOKENS = 2048
COLOCATED_BATCH_TOKENS = 512
RECOMPUTE_TOKENS = 512
GROWTH_HORIZON_TOKENS = 256
COLOCATED_WATERMARK = 0.01


def role_budget(
    role: Role,
    *,
    max_batch: int,
    max_queue: int,
    max_batch_tokens: int | None = None,
    max_prefill_tokens: int | None = None,
    mixing: Mixing = "chunked",
    growth_horizon_tokens: int | None = None,
) -> StepBudget:
    """The budget of an instance with that role; bounds that are None take the role's default.

    On a prefill instance only the tokens of a step bound the number of prompts. A decode instance has tokens beside its
    batch for prompts and preempted sequences. A colocated instance leaves a hundredth of its memory free, as vLLM does.
    """
    match role:
        case Role.PREFILL:
            max_batch_tokens = max_batch_tokens or PREFILL_BATCH_TOKENS
            max_batch = max(max_batch, max_batch_tokens)
            watermark = 0.0
        case Role.DECODE:
            max_prefill_tokens = max_prefill_tokens or RECOMPUTE_TOKENS
            max_batch_tokens = max_batch_tokens or max_batch + max_prefill_tokens
            watermark = 0.0
        case Role.COLOCATED:
            max_batch_tokens = max_batch_tokens or COLOCATED_BATCH_TOKENS
            watermark = COLOCATED_WATERMARK
    return StepBudget(
        max_batch=max_batch,
        max_batch_tokens=max_batch_tokens,
        max_prefill_tokens=min(max_prefill_tokens or max_batch_tokens, max_batch_tokens),
        max_queue=max_queue,
        mixing=mixing,
        growth_horizon_tokens=GROWTH_HORIZON_TOKENS if growth_horizon_tokens is None else growth_horizon_tokens,
        watermark=watermark,
    )
