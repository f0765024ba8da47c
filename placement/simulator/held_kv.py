"""Computed KV that an instance holds for another one, under leases."""

from collections.abc import Callable

from tandem.placement.simulator.attempt import SimulatedAttempt
from tandem.placement.simulator.event_queue import EventQueue
from tandem.scheduling.sequence import Sequence

_RELEASED = -1.0  # the end of a lease on KV that its reader has


class SimulatedHeldKv:
    """What is held, from `add` until `pop`, and its leases of `lease_s` seconds."""

    def __init__(self, lease_s: float, events: EventQueue, lease_ended: Callable[[SimulatedAttempt], None]) -> None:
        """`lease_ended` is told of KV that nobody fetched in time."""
        self._lease_s = lease_s
        self._events = events
        self._lease_ended = lease_ended
        self._sequences: dict[SimulatedAttempt, Sequence] = {}
        self._leases: dict[SimulatedAttempt, float] = {}  # when they end, the first to end first

    def __len__(self) -> int:
        return len(self._sequences)

    def get(self, attempt: SimulatedAttempt) -> Sequence | None:
        return self._sequences.get(attempt)

    def add(self, attempt: SimulatedAttempt, sequence: Sequence) -> None:
        self._sequences[attempt] = sequence
        ends_s = self._events.now_s + self._lease_s
        if ends_s < float("inf"):
            self._leases[attempt] = ends_s
            if len(self._leases) == 1:
                self._events.at(ends_s, self._end_leases, self._leases)

    def pop(self, attempt: SimulatedAttempt) -> Sequence | None:
        return self._sequences.pop(attempt, None)

    def end_lease(self, attempt: SimulatedAttempt) -> None:
        """Its reader has it, or nobody wants it; it is held until `pop`."""
        if attempt in self._leases:
            self._leases[attempt] = _RELEASED

    def renew_lease(self, attempt: SimulatedAttempt) -> None:
        """The reader still waits: the lease begins anew."""
        if self._leases.pop(attempt, None) is not None:
            self._leases[attempt] = self._events.now_s + self._lease_s

    def lose_leases(self) -> None:
        """The instance is gone; the router takes off it what it had."""
        self._leases = {}

    def _end_leases(self, leases: dict[SimulatedAttempt, float]) -> None:
        """One event is pending while there are leases; `leases` says from which life of the instance."""
        if leases is not self._leases:
            return
        now_s = self._events.now_s
        while leases:
            attempt, ends_s = next(iter(leases.items()))
            is_held = attempt in self._sequences and ends_s != _RELEASED
            if is_held and ends_s > now_s:
                self._events.at(ends_s, self._end_leases, leases)
                return
            del leases[attempt]
            if is_held:
                self._lease_ended(attempt)
