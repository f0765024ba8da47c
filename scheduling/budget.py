"""What an instance may compute in a step. Role is a matter of budget: see `StepBudget`."""

from dataclasses import dataclass
from typing import Literal

from tandem.core.session import Role

Mixing = Literal["chunked", "slack", "prompt_first"]


@dataclass(frozen=True, slots=True)
class StepBudget:
    """Bounds of one step, and of what is admitted.

    A prefill instance has a large `max_prefill_tokens` and decodes nothing; a decode instance has a small one; a
    colocated instance lies between.

    `max_batch` bounds the sequences that decode in one step, and those that run with a prompt of their own;
    `max_batch_tokens` all tokens of a step, `max_prefill_tokens` its prompt tokens. `max_queue` bounds the sequences
    that wait.

    chunked       Every step takes a token of each decoding sequence first, then chunks of prompts into what is left of
                  the budget (Sarathi-Serve, OSDI '24; vLLM v1). Decoding never stalls.
    slack         As chunked, but the prompts' part is no longer than the slack of those that decode allows (see
                  `scheduling.slack`). Without a prediction of step times it is as chunked.
    prompt_first  While prompts wait and fit, a step is whole prompts only, `max_prefill_tokens` together, a longer one
                  alone; otherwise a step is all that decode (vLLM 0.2). Every prompt stalls decoding.

    A sequence is admitted when its blocks are there, every sequence could still grow by `growth_horizon_tokens` (or up
    to its own max_tokens, if that is less), and a share `watermark` of the pool stays free beside them. The watermark
    does not hold back a sequence that would run alone. A long horizon preempts rarely, a short one packs more densely.
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
    """What an instance of that role may compute; bounds that are None take the role's default.

    A prefill instance packs as many prompts as its tokens allow. A decode instance has tokens beside its batch for
    prompts and for what was preempted. A colocated one leaves a hundredth of its memory free, as vLLM does.
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
