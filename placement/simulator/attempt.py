"""One attempt at a request, and how instances tell the router about it."""

from typing import TYPE_CHECKING, Protocol

from tandem.core.errors import TandemError
from tandem.core.request import GenerationRequest
from tandem.placement.simulator.network import Transfer
from tandem.scheduling.routed_request import Attempt

if TYPE_CHECKING:
    from tandem.placement.simulator.instance import SimulatedInstance


class SimulatedAttempt:
    """The key of its sequences on both instances. `row` is the request's place in the stream, `routed` is the routing
    machine's side of the attempt. `begun_on` computes the prompt.

    `num_handed_on` are the output tokens, of earlier attempts too, that the client has.
    """

    __slots__ = (
        "begun_on",
        "decode",
        "is_computed",
        "is_first",
        "is_reserved",
        "is_taken",
        "num_handed_on",
        "request",
        "routed",
        "row",
        "transfer",
        "transfer_s",
    )

    def __init__(
        self,
        row: int,
        routed: Attempt,
        request: GenerationRequest,
        begun_on: "SimulatedInstance",
    ) -> None:
        self.row = row
        self.routed = routed
        self.request = request
        self.begun_on = begun_on
        self.is_first = routed.request.num_attempts == 1
        self.decode: SimulatedInstance | None = None
        self.transfer: Transfer | None = None
        self.num_handed_on = request.num_output_tokens
        self.is_computed = False  # its KV is complete
        self.is_reserved = False  # decode has blocks for it
        self.is_taken = False  # a decode instance has acknowledged the KV, which is held no longer
        self.transfer_s = 0.0


class Listener(Protocol):
    """The router, as its workers' events reach it. Calls come at the moment they are about."""

    def prefill_started(self, attempt: SimulatedAttempt, num_cached_tokens: int) -> None: ...

    def prefill_finished(self, attempt: SimulatedAttempt, started_s: float) -> None: ...

    def decode_reserved(self, attempt: SimulatedAttempt) -> None: ...

    def transfer_committed(self, attempt: SimulatedAttempt) -> None: ...

    def second_token(self, attempt: SimulatedAttempt, admitted_s: float, token_s: float) -> None:
        """Decode's first step for it began at `admitted_s` and brought its token at `token_s`."""
        ...

    def failed(self, attempt: SimulatedAttempt, instance_id: str, error: TandemError) -> None:
        """The instance has let go of it."""
        ...

    def decode_finished(self, attempt: SimulatedAttempt) -> None: ...

    def lease_ended(self, attempt: SimulatedAttempt) -> None:
        """The KV that was held for another instance is gone."""
        ...
