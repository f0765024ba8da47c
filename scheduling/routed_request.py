"""A request and its attempts, as the routing machine knows them: counts and ids, never tokens or text."""

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from tandem.core.errors import TandemError
from tandem.core.generation import BlockNamer
from tandem.core.request_slo import NO_SLO, RequestSlo

if TYPE_CHECKING:
    from tandem.scheduling.known_instance import KnownInstance


class RoutedRequest:
    """One request, from `RoutingMachine.submit` to its end. A driver makes it, and afterwards only reads it."""

    __slots__ = (
        "_name_blocks",
        "_names",
        "attempt",
        "avoid",
        "client",
        "deadline_s",
        "demoted_because",
        "due_s",
        "error",
        "give_up_s",
        "key",
        "max_tokens",
        "num_attempts",
        "num_output_tokens",
        "num_prompt_tokens",
        "number",
        "predicted_ttft_s",
        "received_s",
        "retry_s",
        "slo",
    )

    def __init__(
        self,
        key: Hashable,
        *,
        num_prompt_tokens: int,
        max_tokens: int,
        received_s: float,
        deadline_s: float = math.inf,
        name_blocks: BlockNamer | None = None,
        client: str = "",
        slo: RequestSlo = NO_SLO,
    ) -> None:
        """`key` is the driver's name for the request; no other running request has it. `name_blocks` names the prompt's
        full blocks of a given block size; None: the prompt shares no prefix with other requests. The queue is fair
        between clients (`TenantLedger`). The time to first token counts from `received_s`."""
        self.key = key
        self.number = 0  # order of arrival, set by `RoutingMachine.submit`
        self.num_prompt_tokens = num_prompt_tokens
        self.max_tokens = max_tokens
        self.deadline_s = deadline_s
        self.client = client
        self.slo = slo
        self.received_s = received_s
        self.due_s = received_s + slo.ttft_s  # of the first token; inf: no target
        self.predicted_ttft_s: float | None = None  # at admission; None: nothing was measured yet
        self.demoted_because: str | None = None  # set: the request is best effort now, for this reason
        self.num_output_tokens = 0  # of all attempts
        self.num_attempts = 0
        self.attempt: Attempt | None = None  # None: the request waits
        self.avoid: frozenset[str] = frozenset()  # ids of the instances that have failed the request
        self.error: TandemError | None = None  # of the last attempt
        self.retry_s = -math.inf  # from then on the instances in `avoid` are used again
        self.give_up_s = math.inf  # when a request that has lost its instances ends
        self._name_blocks = name_blocks
        self._names: dict[int, Sequence[Hashable]] = {}

    @property
    def has_due_time(self) -> bool:
        """Whether the first token is still meant to be on time."""
        return self.due_s < math.inf and self.demoted_because is None

    @property
    def effective_slo(self) -> RequestSlo:
        """The targets in force: none for a request that was made best effort."""
        return self.slo if self.demoted_because is None else NO_SLO

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV the next attempt needs: the prompt, and the output of earlier attempts."""
        return self.num_prompt_tokens + self.num_output_tokens

    @property
    def growth_tokens(self) -> int:
        """Output tokens still to come, at most."""
        return self.max_tokens - self.num_output_tokens

    @property
    def max_total_tokens(self) -> int:
        return self.num_prompt_tokens + self.max_tokens

    @property
    def has_block_names(self) -> bool:
        return self._name_blocks is not None

    def block_names(self, block_size: int) -> Sequence[Hashable]:
        """Names of the prompt's full blocks; computed once for each block size."""
        names = self._names.get(block_size)
        if names is None:
            names = self._names[block_size] = () if self._name_blocks is None else self._name_blocks(block_size)
        return names


class Attempt:
    """One try of a request on one or two instances, which know it by `handle`. Read-only for drivers.

    `prefill` computes the prompt, and `decode` reads the KV and decodes. Each is None while that instance holds nothing
    of the attempt. With `hand_over` False, `prefill` also decodes.
    """

    __slots__ = (
        "begun_s",
        "decode",
        "error",
        "expected",
        "first_token_s",
        "growth_tokens",
        "hand_over",
        "handle",
        "has_first_token",
        "has_started",
        "has_transfer",
        "num_tokens",
        "prefill",
        "reader_error",
        "request",
    )

    def __init__(
        self, handle: int, request: RoutedRequest, prefill: "KnownInstance", hand_over: bool, begun_s: float
    ) -> None:
        self.handle = handle
        self.request = request
        self.prefill: KnownInstance | None = prefill
        self.decode: KnownInstance | None = None
        self.hand_over = hand_over
        self.begun_s = begun_s
        self.num_tokens = request.num_tokens
        self.growth_tokens = request.growth_tokens
        self.has_started = False  # the first chunk of the prompt has been in a step
        self.has_first_token = False
        self.has_transfer = False  # the decode instance owns the KV
        self.error: TandemError | None = None  # why the attempt failed
        self.reader_error: TandemError | None = None  # why another decode instance was selected after the first
        self.expected: tuple[float, float] | None = None  # predicted TTFT from `begun_s`, and TPOT, in seconds
        self.first_token_s: float | None = None

    @property
    def generating(self) -> "KnownInstance | None":
        """The instance that computes the tokens after the first."""
        return self.decode if self.hand_over else self.prefill
