"""Collects the events of an instance's loop: see `LoopEvent`."""

from tandem.core.attempt_id import AttemptId
from tandem.core.errors import TandemError
from tandem.core.session import RequestFailed, SessionEvent
from tandem.worker.loop_messages import LoopEvent, SendEvent


class LoopEvents:
    """Events in order, until `take`."""

    def __init__(self) -> None:
        self._events: list[LoopEvent] = []

    def add(self, event: LoopEvent) -> None:
        self._events.append(event)

    def send(self, attempt_id: AttemptId, event: SessionEvent) -> None:
        """Send an event to the router of the attempt."""
        self._events.append(SendEvent(attempt_id.session_id, event))

    def fail(self, attempt_id: AttemptId, error: TandemError) -> None:
        """The attempt has ended with this error, and is no longer scheduled."""
        self.send(attempt_id, RequestFailed(attempt_id.handle, error.code, error.message))

    def take(self) -> list[LoopEvent]:
        """Events since the last call."""
        events, self._events = self._events, []
        return events
