"""What an instance may compute in a step. Role is a matter of budget: see `StepBudget`."""

from dataclasses import dataclass
from typing import Literal

Mixing = Literal["chunked", "prompt_first"]


@dataclass(frozen=True, slots=True)
class StepBudget:
    """Bounds of one step, and of what is admitted.

                       prefill          decode           colocated
    max_prefill_tokens large            small            all of max_batch_tokens
    growth_horizon     -                about an answer  0, as in vLLM

    `max_batch` bounds the sequences that decode in one step, and those that run with a prompt of their own;
    `max_batch_tokens` all tokens of a step, `max_prefill_tokens` its prompt tokens. `max_queue` bounds the sequences that
    wait.

    chunked       Every step takes a token of each decoding sequence first, then chunks of prompts into what is left of the
                  budget (Sarathi-Serve, OSDI '24; vLLM v1). Decoding never stalls.
    prompt_first  While prompts wait and fit, a step is whole prompts only, `max_prefill_tokens` together, a longer one
                  alone; otherwise a step is all that decode (vLLM 0.2). Every prompt stalls decoding.

    A sequence is admitted when its blocks are there, every sequence could still grow by `growth_horizon_tokens` (or up to
    its own max_tokens, if that is less), and a share `watermark` of the pool stays free beside them. The watermark does
    not hold back a sequence that would run alone. A long horizon preempts rarely, a short one packs more densely.
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
