"""The interface between the text side of the router and the part that gets tokens from workers."""

from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from typing import Protocol

from tandem.core.request import FinishReason, GenerationRequest, SampledToken, TokenLogprob
from tandem.core.timeline import Timeline

BlockNamer = Callable[[int], Sequence[Hashable]]
"""Names of a prompt's full blocks of a given size: blocks of equal tokens after equal tokens have equal names."""


class Generation(Protocol):
    """One running request. Iterating gives new tokens; it ends after the last token, or raises a TandemError.

    `aclose` before the end (a stop string is complete, the client disconnects) frees everything on every worker. The
    request then counts as cancelled, unless the caller has set `finish_reason` first. After the end, or after `aclose`,
    `timeline` is complete.
    """

    request: GenerationRequest
    finish_reason: FinishReason | None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None  # known when the first token is

    def __aiter__(self) -> AsyncIterator[tuple[SampledToken, ...]]: ...

    async def aclose(self) -> None: ...

    def timeline(self) -> Timeline: ...

    def explanation(self) -> str:
        """Which instances its attempts were given so far, and the comparison behind it: a line of JSON in ASCII."""
        ...


class TokenGenerator(Protocol):
    """Turns a request in token ids into tokens."""

    async def name_blocks(self, token_ids: tuple[int, ...], cache_salt: str) -> BlockNamer:
        """The names of a prompt's blocks, for all its choices. Long prompts take several turns of the event loop."""
        ...

    def start(
        self, request: GenerationRequest, received_s: float, name_blocks: BlockNamer | None = None, client: str = ""
    ) -> Generation:
        """Start. `received_s` is the time of the request's arrival, on the router's monotonic clock. `name_blocks`: of
        the prompt; without it the names are worked out here. `client` is whom the request counts to while it waits:
        waiting is fair between clients.

        Raises OverloadedError, UnavailableError, ContextLengthError or DuplicateRequestError if it cannot accept the
        request.
        """
        ...

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and output that a live pair of workers can hold. Raises UnavailableError."""
        ...
