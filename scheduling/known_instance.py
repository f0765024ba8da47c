"""One instance as a router knows it: its last report, and the attempts of this router that are in flight there.

The router counts its own load exactly and at once: what it has sent and not yet seen done, without waiting for a
report. Load that a report shows beyond that comes from other routers (*foreign* load). A report describes some moment
between the arrival of the previous report and its own arrival, and at that moment the instance had at most the peak of
the own load in this interval. So only load above that peak is foreign. The interval before counts too, because a router
that was stopped may read two reports at once. A single router thus never sees foreign load.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tandem.core.session import InstanceState, InstanceStatus, Role
from tandem.scheduling.routing import DecodeView, PrefillView

if TYPE_CHECKING:
    from tandem.scheduling.routed_request import Attempt


@dataclass(slots=True)
class _InFlight:
    """An attempt at this instance, and its part of the instance's sums."""

    attempt: "Attempt"
    uncomputed_tokens: int
    held_tokens: int
    expected_tokens: int
    awaited_tokens: int = 0


class KnownInstance:
    """Owned by the routing machine. The sums over this router's attempts in flight, in tokens:

    uncomputed_tokens  of prompts that wait to be computed
    held_tokens        KV slots that attempts hold or may grow to, in whole blocks
    expected_tokens    KV slots that attempts will probably need where they decode: on this instance, or on a decode
                       instance that is not selected yet
    awaited_tokens     of prompts whose KV another instance has computed and this one has not fetched yet
    """

    __slots__ = (
        "_foreign",
        "_in_flight",
        "_last_peak",
        "_peak",
        "awaited_tokens",
        "capacity_tokens",
        "expected_tokens",
        "held_tokens",
        "host",
        "instance_id",
        "is_connected",
        "memory_tokens",
        "status",
        "uncomputed_tokens",
    )

    def __init__(self, status: InstanceStatus) -> None:
        self.instance_id = status.instance_id
        self.is_connected = False
        self.uncomputed_tokens = 0
        self.held_tokens = 0
        self.expected_tokens = 0
        self.awaited_tokens = 0
        self._in_flight: dict[int, _InFlight] = {}
        self._peak = self._last_peak = (0, 0, 0)  # uncomputed tokens, held tokens, requests
        self.report(status)

    @property
    def role(self) -> Role:
        return self.status.role

    @property
    def is_usable(self) -> bool:
        """Whether the instance takes new attempts."""
        return self.is_connected and self.status.state is InstanceState.READY

    @property
    def offer(self) -> tuple[bool, Role, str, int]:
        """The properties that decide for which requests the instance is a candidate; load is not among them."""
        return self.is_usable, self.role, self.status.fingerprint, self.capacity_tokens

    @property
    def open_requests(self) -> int:
        """Attempts of this router."""
        return len(self._in_flight)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that wait to be computed, foreign ones included."""
        return self.uncomputed_tokens + self._foreign[0]

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens of this router that wait: to be computed, or for memory to decode them."""
        return self.uncomputed_tokens + self.awaited_tokens

    def attempts(self) -> "list[Attempt]":
        return [entry.attempt for entry in self._in_flight.values()]

    def find(self, handle: int) -> "Attempt | None":
        """The attempt with that handle, None if it is not in flight here."""
        entry = self._in_flight.get(handle)
        return None if entry is None else entry.attempt

    def report(self, status: InstanceStatus) -> None:
        """Take over a report, and estimate the foreign load from it."""
        self.status = status
        self.host = status.address.rpartition(":")[0]
        self.memory_tokens = status.blocks.total * status.block_size
        self.capacity_tokens = min(status.max_model_len, self.memory_tokens)
        blocks = status.blocks
        reported = (
            status.uncomputed_tokens,
            (blocks.total - blocks.free - blocks.cached) * status.block_size + status.unreserved_tokens,
            status.running_requests + status.waiting_requests,
        )
        uncomputed, held, requests = (
            max(0, shown - max(peak, last_peak))
            for shown, peak, last_peak in zip(reported, self._peak, self._last_peak, strict=True)
        )
        self._foreign = (uncomputed, held, requests)
        self._last_peak, self._peak = self._peak, (self.uncomputed_tokens, self.held_tokens, len(self._in_flight))

    def dispatch(self, attempt: "Attempt", uncomputed_tokens: int, held_tokens: int, expected_tokens: int) -> None:
        """The attempt was sent to this instance."""
        held_tokens += -held_tokens % self.status.block_size  # memory is allocated in whole blocks
        self._in_flight[attempt.handle] = _InFlight(attempt, uncomputed_tokens, held_tokens, expected_tokens)
        self.expected_tokens += expected_tokens
        self.uncomputed_tokens += uncomputed_tokens
        self.held_tokens += held_tokens
        now, peak = (self.uncomputed_tokens, self.held_tokens, len(self._in_flight)), self._peak
        if now[0] > peak[0] or now[1] > peak[1] or now[2] > peak[2]:
            self._peak = (max(now[0], peak[0]), max(now[1], peak[1]), max(now[2], peak[2]))

    def record_progress(self, handle: int, num_tokens: int) -> bool:
        """`num_tokens` of the attempt's tokens are computed or were cached. Returns whether the load has changed."""
        entry = self._in_flight[handle]
        num_tokens = min(num_tokens, entry.uncomputed_tokens)
        self.uncomputed_tokens -= num_tokens
        entry.uncomputed_tokens -= num_tokens
        return num_tokens > 0

    def decode_chosen(self, handle: int) -> None:
        """The attempt decodes on another instance, which counts its expected tokens from now on."""
        entry = self._in_flight[handle]
        self.expected_tokens -= entry.expected_tokens
        entry.expected_tokens = 0

    def await_kv(self, handle: int) -> None:
        """Another instance has computed the prompt; this one fetches the KV once it has memory for it."""
        entry = self._in_flight[handle]
        self.awaited_tokens += entry.attempt.num_tokens - entry.awaited_tokens
        entry.awaited_tokens = entry.attempt.num_tokens

    def kv_arrived(self, handle: int) -> None:
        """This instance owns the attempt's KV."""
        entry = self._in_flight[handle]
        self.awaited_tokens -= entry.awaited_tokens
        entry.awaited_tokens = 0

    def release(self, handle: int) -> None:
        """The attempt has ended at this instance."""
        entry = self._in_flight.pop(handle)
        self.expected_tokens -= entry.expected_tokens
        self.awaited_tokens -= entry.awaited_tokens
        self.uncomputed_tokens -= entry.uncomputed_tokens
        self.held_tokens -= entry.held_tokens

    def prefill_view(self) -> PrefillView:
        return PrefillView(
            self.instance_id, self.status.fingerprint, self.is_usable, self.capacity_tokens, self.queued_tokens
        )

    def decode_view(self) -> DecodeView:
        return DecodeView(
            self.instance_id,
            self.status.fingerprint,
            self.is_usable,
            self.capacity_tokens,
            self.memory_tokens,
            self.held_tokens + self._foreign[1],
            len(self._in_flight) + self._foreign[2],
        )
