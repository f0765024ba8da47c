"""Input and output of one engine step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.core.errors import InternalError
from tandem.core.request import SampledToken, SamplingParams, TokenLogprob


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """Draw the token at index `position` of the whole sequence (prompt and answer).

    `history` is the sequence so far, `position` tokens long, the first `num_prompt_tokens` of which are the prompt;
    only penalties read it, so it may be empty for a request that has none.
    """

    params: SamplingParams
    position: int
    history: Sequence[int]
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """The part of one sequence that a step computes: `token_ids`, at positions `start`, `start` + 1, ...

    `block_table` lists the sequence's blocks in order. They hold the KV of the `start` tokens before the slice, and
    there are enough of them for the new tokens too. `sample` None: a middle chunk of a prompt, nothing is drawn.
    `prompt_logprobs` N asks, for each token of the slice, for the log-probabilities of the token that follows it and
    of the N likeliest tokens. `next_token_id` follows the slice's last token; None if unknown or not wanted.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    sample: SampleRequest | None = None
    prompt_logprobs: int | None = None
    next_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class StepHandle:
    """A step between `Engine.launch` and `Engine.collect`.

    `hidden` [rows, hidden] holds the hidden states that `slices` need, in their order. `forward_done` is recorded
    behind the forward pass; None on a CPU, where the forward pass is complete.
    """

    number: int
    slices: Sequence[SequenceSlice]
    hidden: Tensor
    forward_done: torch.cuda.Event | None


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Aligned with the slices of the step.

    `tokens[i]` is None where slice i asked for none or failed. `prompt_logprobs[i]` has one entry per token of slice i
    (one less without `next_token_id`): entry j is for the token at position `start` + j + 1. A slice whose logits
    are not finite has an error in `errors[i]`, and no token; the others are not affected.
    """

    tokens: list[SampledToken | None]
    prompt_logprobs: list[list[TokenLogprob] | None]
    errors: list[InternalError | None]
