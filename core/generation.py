"""The seam between the text side of the router and the part that gets tokens from workers."""

from collections.abc import AsyncIterator
from typing import Protocol

from tandem.core.request import FinishReason, GenerationRequest, SampledToken, TokenLogprob
from tandem.core.timeline import Timeline


class Generation(Protocol):
    """One running request. Iterate it for new tokens; it ends after the last one, or raises a TandemError.

    Closing it early (a stop string was found, the client went away) frees everything on every worker, and counts as
    cancelled unless the closer has set `finish_reason` first. After the end, or after `aclose`, `timeline` is complete.
    """

    request: GenerationRequest
    finish_reason: FinishReason | None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None  # known once the first token is

    def __aiter__(self) -> AsyncIterator[tuple[SampledToken, ...]]: ...

    async def aclose(self) -> None: ...

    def timeline(self) -> Timeline: ...


class TokenGenerator(Protocol):
    """Turns a request in token ids into tokens, on whichever workers."""

    def start(self, request: GenerationRequest, received_s: float) -> Generation:
        """Begin. `received_s` is when the router received the request, on its own monotonic clock.

        Raises OverloadedError, UnavailableError, ContextLengthError or DuplicateRequestError at once if it cannot be
        accepted.
        """
        ...

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus answer that some live pair of workers can hold. Raises UnavailableError if none does."""
        ...
