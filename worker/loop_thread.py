"""The thread on which an instance schedules and computes.

    any thread          loop thread                            event loop thread
    post(command) --->  apply commands, schedule, step  --->   deliver(events), once per turn

The loop thread is the sole owner of the instance's sequences and blocks; everybody else sends it values.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from tandem.worker.mailbox import Mailbox

log = logging.getLogger(__name__)

SETTLE_S = 0.02  # self-checks take their time: not while the next request may be on its way

Command = TypeVar("Command")
CommandIn = TypeVar("CommandIn", contravariant=True)
Event = TypeVar("Event")


class StepLoop(Protocol[CommandIn, Event]):
    """What runs on the thread: a state machine without threads of its own, so that tests can turn it by hand."""

    def apply(self, command: CommandIn) -> None: ...

    def prepare(self) -> bool:
        """Schedule the next step. False: there is nothing to compute now."""
        ...

    def compute(self) -> None:
        """Run the step that `prepare` scheduled."""
        ...

    def idle(self) -> None:
        """Called once when there has been nothing to do for a moment: the time for self-checks."""
        ...

    def take_events(self) -> list[Event]:
        """Events since the last call."""
        ...


class LoopThread(Generic[Command, Event]):
    """Turns a `StepLoop` until it is stopped."""

    def __init__(
        self,
        name: str,
        make_loop: Callable[[], StepLoop[Command, Event]],
        deliver: Callable[[list[Event]], None],
        on_crash: Callable[[BaseException], None],
        idle_wait_s: float = 0.2,
    ) -> None:
        """`make_loop` runs on the thread: the thread that loads an engine is the one that steps it, so that the
        engine's helper threads are made once. `deliver` and `on_crash` are called on the event loop of `start`.
        """
        self._name = name
        self._make_loop = make_loop
        self._deliver = deliver
        self._on_crash = on_crash
        self._idle_wait_s = idle_wait_s
        self._mailbox: Mailbox[Command | None] = Mailbox()
        self._thread: threading.Thread | None = None
        self._event_loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """Returns when the loop is made and turning; raises what `make_loop` raised."""
        self._event_loop = asyncio.get_running_loop()
        made: asyncio.Future[None] = self._event_loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(made,), name=self._name, daemon=True)
        self._thread.start()
        await made

    def post(self, command: Command) -> None:
        self._mailbox.post(command)

    async def stop(self) -> None:
        """Ends after the step in progress. Commands posted later are not seen."""
        if self._thread is not None:
            self._mailbox.post(None)
            await asyncio.to_thread(self._thread.join)

    def _run(self, made: asyncio.Future[None]) -> None:
        try:
            loop = self._make_loop()
        except BaseException as error:  # noqa: BLE001 - the thread's door: `start` raises it
            reason = error  # `error` is unbound when the call below runs
            self._call_soon(lambda: _settle(made, reason))
            return
        self._call_soon(lambda: _settle(made, None))
        try:
            self._turn_until_stopped(loop)
        except BaseException as error:
            log.exception("%s: the loop failed", self._name)
            crash = error
            self._call_soon(lambda: self._on_crash(crash))

    def _turn_until_stopped(self, loop: StepLoop[Command, Event]) -> None:
        quiet_turns = 0  # so many turns in a row had nothing to compute
        while True:
            commands = self._mailbox.take_all((0.0, SETTLE_S, self._idle_wait_s)[min(quiet_turns, 2)])
            for command in commands:
                if command is None:
                    return
                loop.apply(command)
            busy = loop.prepare()
            self._flush(loop)  # "started" must leave before the step, so that the other side can work during it
            if busy:
                loop.compute()
                self._flush(loop)
                quiet_turns = 0
            else:
                quiet_turns = 1 if commands else quiet_turns + 1
                if quiet_turns == 2:
                    loop.idle()

    def _flush(self, loop: StepLoop[Command, Event]) -> None:
        if events := loop.take_events():
            self._call_soon(lambda: self._deliver(events))

    def _call_soon(self, call: Callable[[], object]) -> None:
        assert self._event_loop is not None
        try:
            self._event_loop.call_soon_threadsafe(call)
        except RuntimeError:  # the event loop is closed: the process is ending
            log.debug("%s: an event came after the end", self._name)


def _settle(future: asyncio.Future[None], error: BaseException | None) -> None:
    if future.done():  # whoever waited has given up
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
