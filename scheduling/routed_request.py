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
    """Read-only for drivers. `key` is the driver's name for it, `num_output_tokens` are those of all attempts."""

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
        number: int,
        num_prompt_tokens: int,
        max_tokens: int,
        deadline_s: float,
        name_blocks: BlockNamer | None,
        client: str = "",
        slo: RequestSlo = NO_SLO,
        received_s: float = 0.0,
    ) -> None:
        """`name_blocks` names the prompt's full blocks of a given size; None: nobody else has them. Requests of one
        `client` wait for each other, and not for those of others, as far as the instances have room for both. Its time
        to first token counts from `received_s`."""
        self.key = key
        self.number = number  # in order of arrival
        self.num_prompt_tokens = num_prompt_tokens
        self.max_tokens = max_tokens
        self.deadline_s = deadline_s
        self.client = client
        self.slo = slo
        self.received_s = received_s
        self.due_s = received_s + slo.ttft_s  # its first token; inf: no target
        self.predicted_ttft_s: float | None = None  # when it came; None: nothing was measured yet
        self.demoted_because: str | None = None  # it is best effort now
        self.num_output_tokens = 0
        self.num_attempts = 0
        self.attempt: Attempt | None = None  # None: it waits
        self.avoid: frozenset[str] = frozenset()  # instances that have failed it
        self.error: TandemError | None = None  # of the last attempt
        self.retry_s = -math.inf  # until then it waits for others than those to avoid
        self.give_up_s = math.inf
        self._name_blocks = name_blocks
        self._names: dict[int, Sequence[Hashable]] = {}

    @property
    def has_due_time(self) -> bool:
        """Its first token is still meant to be in time."""
        return self.due_s < math.inf and self.demoted_because is None

    @property
    def effective_slo(self) -> RequestSlo:
        """The targets that are aimed at: none, once it is best effort."""
        return self.slo if self.demoted_because is None else NO_SLO

    @property
    def num_tokens(self) -> int:
        """Those to compute before the next new one."""
        return self.num_prompt_tokens + self.num_output_tokens

    @property
    def growth_tokens(self) -> int:
        """Those still to come."""
        return self.max_tokens - self.num_output_tokens

    @property
    def max_total_tokens(self) -> int:
        return self.num_prompt_tokens + self.max_tokens

    @property
    def has_block_names(self) -> bool:
        return self._name_blocks is not None

    def block_names(self, block_size: int) -> Sequence[Hashable]:
        """Of the prompt's full blocks; worked out once."""
        names = self._names.get(block_size)
        if names is None:
            names = self._names[block_size] = () if self._name_blocks is None else self._name_blocks(block_size)
        return names


class Attempt:
    """One try of a request. Read-only for drivers. `handle` names it at its instances.

    `prefill` computes the prompt, `decode` is another instance that reads the KV; each is None while nothing of the
    attempt is there. `hand_over` False: `prefill` does both.
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
        self.has_started = False  # the prompt is or was in a step
        self.has_first_token = False
        self.has_transfer = False
        self.error: TandemError | None = None  # why it failed
        self.reader_error: TandemError | None = None  # why another decode instance was selected after the first
        self.expected: tuple[float, float] | None = None  # TTFT since then and TPOT, as predicted
        self.first_token_s: float | None = None

    @property
    def generating(self) -> "KnownInstance | None":
        """The instance that computes the tokens after the first."""
        return self.decode if self.hand_over else self.prefill
