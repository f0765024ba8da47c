"""One worker instance as the router sees it: its last report, its session, what this router has open there."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

from tandem.core.errors import TandemError, UnavailableError, error_from_code
from tandem.core.request import GenerationRequest
from tandem.core.session import (
    Cancel,
    DecodeEvent,
    DecodeFrame,
    DecodeReserved,
    DecodeTokens,
    InstanceState,
    InstanceStatus,
    OpenDecode,
    PrefillEvent,
    PrefillFinished,
    PrefillStarted,
    RequestFailed,
    Role,
    SubmitPrefill,
    TransferCommitted,
)

WorkerCommand = SubmitPrefill | OpenDecode | Cancel
WorkerEvent = PrefillEvent | DecodeEvent
ProgressEvent = PrefillStarted | PrefillFinished | DecodeReserved | TransferCommitted


class CommandSender(Protocol):
    def send(self, command: WorkerCommand) -> None:
        """Queue a command; never blocks. Raises UnavailableError once the session is closed."""
        ...


class WorkerSession(CommandSender, Protocol):
    """An open session with one worker."""

    def events(self) -> AsyncIterator[WorkerEvent]:
        """In order. Raises UnavailableError when the worker is gone."""
        ...

    async def close(self) -> None: ...


class SessionOpener(Protocol):
    """How a fleet reaches its workers."""

    async def open(self, status: InstanceStatus) -> WorkerSession:
        """Raises UnavailableError if the worker does not answer within a bounded time."""
        ...


class EventSink(Protocol):
    """One attempt, as the instance that works on it sees it. Called on the event loop; never blocks, never raises."""

    def on_progress(self, event: ProgressEvent) -> None: ...

    def on_tokens(self, item: DecodeTokens) -> None: ...

    def on_failed(self, instance: "Instance", error: TandemError) -> None: ...


@dataclass(slots=True)
class _Open:
    """One handle: who hears of it, and what it still weighs on the instance."""

    sink: EventSink
    waiting_tokens: int
    held_tokens: int


class Instance:
    """Owned by the fleet. Attempts open, cancel and release handles here.

    The load figures are exact and immediate: they count what this router has sent and not yet seen finished, without
    waiting for the worker's next heartbeat. `on_change` hears of every change of them, and of whether it takes work.
    """

    def __init__(self, status: InstanceStatus, heard_s: float, on_change: Callable[["Instance"], None]) -> None:
        self.status = status
        self.heard_s = heard_s
        self.waiting_tokens = 0  # dispatched from here and not computed yet
        self.held_tokens = 0  # KV slots that open requests hold or may grow to
        self._others_waiting_tokens = status.waiting_tokens  # of other routers, as of the last report
        self._session: CommandSender | None = None
        self._open: dict[int, _Open] = {}
        self._on_change = on_change

    @property
    def instance_id(self) -> str:
        return self.status.instance_id

    @property
    def role(self) -> Role:
        return self.status.role

    @property
    def open_requests(self) -> int:
        return len(self._open)

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait there to be computed, other routers' included."""
        return self.waiting_tokens + self._others_waiting_tokens

    @property
    def connected(self) -> bool:
        return self._session is not None

    @property
    def accepts_work(self) -> bool:
        return self._session is not None and self.status.state is InstanceState.READY

    @property
    def capacity_tokens(self) -> int:
        """Longest sequence it can hold: the model's context, or all of its KV memory."""
        return min(self.status.max_model_len, self.status.blocks.total * self.status.block_size)

    def report(self, status: InstanceStatus, now_s: float) -> None:
        """Its next heartbeat."""
        self.status = status
        self.heard_s = now_s
        self._others_waiting_tokens = max(0, status.waiting_tokens - self.waiting_tokens)
        self._on_change(self)

    def connect(self, session: CommandSender) -> None:
        assert self._session is None, "an instance has one session"
        self._session = session
        self._on_change(self)

    def lose(self, error: TandemError) -> None:
        """The session is over: everything open there fails at once. Without a session this does nothing."""
        self._session = None
        lost = list(self._open.items())
        self._open.clear()
        self.waiting_tokens = self.held_tokens = 0
        self._on_change(self)
        for _, entry in lost:
            entry.sink.on_failed(self, error)

    def submit(self, command: SubmitPrefill | OpenDecode, sink: EventSink) -> None:
        """Send an attempt there and hear of it until it is released. Raises UnavailableError if there is no session."""
        if self._session is None:
            raise UnavailableError(f"no {self.role.value} worker can be reached")
        self._session.send(command)
        self._open[command.handle] = entry = _Open(sink, *_weight(command))
        self.waiting_tokens += entry.waiting_tokens
        self.held_tokens += entry.held_tokens
        self._on_change(self)

    def computed(self, handle: int, num_tokens: int) -> None:
        """So many of its tokens need not be waited for any more."""
        if entry := self._open.get(handle):
            num_tokens = min(num_tokens, entry.waiting_tokens)
            self.waiting_tokens -= num_tokens
            entry.waiting_tokens -= num_tokens
            self._on_change(self)

    def release(self, handle: int) -> None:
        """The worker is done with it. Later events of that handle are dropped."""
        if entry := self._open.pop(handle, None):
            self.waiting_tokens -= entry.waiting_tokens
            self.held_tokens -= entry.held_tokens
            self._on_change(self)

    def cancel(self, handle: int) -> None:
        """Release it and tell the worker to drop it. Does nothing if it is released already."""
        if handle not in self._open:
            return
        self.release(handle)
        if self._session is not None:
            try:
                self._session.send(Cancel(handle))
            except UnavailableError:
                return  # the worker drops all it has when its session ends

    def deliver(self, event: WorkerEvent) -> None:
        """Hand an event to the attempts it concerns; those of released handles are dropped."""
        if type(event) is DecodeFrame:
            for item in event.items:
                if entry := self._open.get(item.handle):
                    entry.sink.on_tokens(item)
            return
        assert not isinstance(event, DecodeFrame)
        entry = self._open.get(event.handle)
        if entry is None:
            return
        if isinstance(event, RequestFailed):
            self.release(event.handle)
            entry.sink.on_failed(self, error_from_code(event.code, event.message))
        else:
            entry.sink.on_progress(event)


def _weight(command: SubmitPrefill | OpenDecode) -> tuple[int, int]:
    """(tokens that wait to be computed, KV slots it may come to hold) of a command."""
    request: GenerationRequest = command.request
    if isinstance(command, SubmitPrefill):
        return len(request.token_ids), len(request.token_ids)
    return 0, request.max_total_tokens
