"""One attempt at a request, and how instances tell the router about it."""

from typing import TYPE_CHECKING, Protocol

from tandem.core.errors import TandemError
from tandem.core.request import GenerationRequest
from tandem.placement.simulator.network import Transfer

if TYPE_CHECKING:
    from tandem.placement.simulator.instance import SimulatedInstance


class Attempt:
    """The key of its sequences on both instances. `row` is the request's place in the stream, `number` counts from 0.

    `num_handed_on` are the output tokens, of earlier attempts too, that the client has.
    """

    __slots__ = (
        "avoid",
        "colocated",
        "decode",
        "is_computed",
        "is_reserved",
        "num_handed_on",
        "number",
        "prefill",
        "request",
        "row",
        "transfer",
        "transfer_s",
        "waiting_tokens",
    )

    def __init__(self, row: int, number: int, request: GenerationRequest, avoid: frozenset[str]) -> None:
        self.row = row
        self.number = number
        self.request = request
        self.avoid = avoid  # instances that have failed the request
        self.prefill: SimulatedInstance | None = None
        self.decode: SimulatedInstance | None = None
        self.colocated: SimulatedInstance | None = None  # instead of the other two
        self.transfer: Transfer | None = None
        self.num_handed_on = request.num_output_tokens
        self.is_computed = False  # its KV is complete
        self.is_reserved = False  # decode has blocks for it
        self.transfer_s = 0.0
        self.waiting_tokens = 0  # not yet computed, as the router knows

    @property
    def num_tokens(self) -> int:
        """Those to compute before the first new one."""
        return len(self.request.token_ids)

    @property
    def growth_tokens(self) -> int:
        """Those still to come."""
        return self.request.sampling.max_tokens - self.request.num_output_tokens

    @property
    def prompt_tokens_per_step(self) -> float:
        """See `scheduling.mixed_routing.colocated_offer`."""
        return self.num_tokens / max(1, self.growth_tokens)

    @property
    def begun_on(self) -> "SimulatedInstance":
        """The instance that computes its prompt."""
        instance = self.prefill or self.colocated
        assert instance is not None, "an attempt that has not begun"
        return instance


class Listener(Protocol):
    """The router, as its workers' events reach it. Calls come at the moment they are about."""

    def prefill_started(self, attempt: Attempt, num_cached_tokens: int) -> None: ...

    def prefill_finished(self, attempt: Attempt, started_s: float) -> None: ...

    def decode_reserved(self, attempt: Attempt) -> None: ...

    def transfer_committed(self, attempt: Attempt) -> None: ...

    def second_token(self, attempt: Attempt, admitted_s: float, token_s: float) -> None:
        """Decode's first step for it began at `admitted_s` and brought its token at `token_s`."""
        ...

    def failed(self, attempt: Attempt, instance_id: str, error: TandemError) -> None:
        """The instance has let go of it."""
        ...

    def decode_finished(self, attempt: Attempt) -> None: ...

    def lease_ended(self, attempt: Attempt) -> None:
        """The KV that was held for another instance is gone."""
        ...
