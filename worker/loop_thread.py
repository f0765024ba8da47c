"""The thread on which an instance schedules and computes.

    event loop thread   loop thread                                     event loop thread
    post(command) --->  apply commands, schedule, launch, collect --->  deliver(events), twice per turn at most

The loop thread is the sole owner of the instance's sequences and blocks; other threads send it values.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable

from tandem.worker.loop import InstanceLoop
from tandem.worker.loop_messages import LoopCommand, LoopEvent
from tandem.worker.progress import StepProgress

log = logging.getLogger(__name__)

SETTLE_S = 0.02  # idle time before self-checks, so that they do not delay a request that follows at once
IDLE_WAIT_S = 0.2  # for the first command, once the loop has been idle for longer


class LoopThread:
    """Runs an `InstanceLoop` until it is stopped."""

    def __init__(
        self,
        name: str,
        make_loop: Callable[[], InstanceLoop],
        deliver: Callable[[list[LoopEvent]], None],
        on_crash: Callable[[BaseException], None],
        progress: StepProgress,
    ) -> None:
        """`make_loop` runs on the thread: the thread that loads an engine also computes its steps, so that the engine's
        helper threads are made once. `deliver` and `on_crash` are called on the event loop of `start`; an error of the
        loop or of `deliver` is reported to `on_crash`. The thread records its steps in `progress`.
        """
        self._name = name
        self._make_loop = make_loop
        self._deliver = deliver
        self._on_crash = on_crash
        self._progress = progress
        self._mailbox: queue.SimpleQueue[LoopCommand | None] = queue.SimpleQueue()
        self._num_posted = 0
        self._loop: InstanceLoop | None = None
        self._thread: threading.Thread | None = None
        self._event_loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """Returns when the loop runs. Raises the error of `make_loop`."""
        self._event_loop = asyncio.get_running_loop()
        made: asyncio.Future[None] = self._event_loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(made,), name=self._name, daemon=True)
        self._thread.start()
        await made

    def post(self, command: LoopCommand) -> None:
        """Never blocks. Call it on the event loop of `start`."""
        self._num_posted += 1
        self._mailbox.put(command)

    @property
    def is_idle(self) -> bool:
        """Whether the loop has nothing to do after all commands that were posted."""
        report = None if self._loop is None else self._loop.report
        return report is not None and report.is_empty and report.num_commands == self._num_posted

    async def stop(self) -> None:
        """End the thread after the steps under way. Later commands are ignored."""
        if self._thread is not None:
            self._mailbox.put(None)
            await asyncio.to_thread(self._thread.join)

    def _run(self, made: asyncio.Future[None]) -> None:
        try:
            self._loop = loop = self._make_loop()
        except BaseException as error:  # noqa: BLE001 - `start` raises it
            reason = error  # `error` is unbound when the call below runs
            self.call_soon(lambda: _settle(made, reason))
            return
        self.call_soon(lambda: _settle(made, None))
        try:
            self._turn_until_stopped(loop)
        except BaseException as error:
            log.exception("%s: the loop failed", self._name)
            crash = error
            self.call_soon(lambda: self._on_crash(crash))

    def _turn_until_stopped(self, loop: InstanceLoop) -> None:
        quiet_turns = 0  # turns in a row that had nothing to compute
        while True:
            commands = self._take_commands((0.0, SETTLE_S, IDLE_WAIT_S)[min(quiet_turns, 2)])
            self._progress.begin(0)
            for command in commands:
                if command is None:
                    self._end(loop)
                    return
                loop.apply(command)
            busy = loop.prepare()
            self._flush(loop)  # before the step: PrefillStarted lets the router select a decode instance during it
            if busy or loop.has_steps:
                self._progress.begin(loop.step_size)
                if busy:
                    loop.launch()
                if loop.is_full or not busy:
                    loop.collect()
                self._flush(loop)
                quiet_turns = 0
            else:
                quiet_turns = 1 if commands else quiet_turns + 1
                if quiet_turns == 2:
                    loop.idle()
            self._progress.end()

    def _end(self, loop: InstanceLoop) -> None:
        """Collect all steps, so that the other ranks are between two steps."""
        while loop.has_steps:
            self._progress.begin(loop.step_size)
            loop.collect()
        self._progress.end()

    def _take_commands(self, wait_s: float) -> list[LoopCommand | None]:
        """All posted commands; waits up to `wait_s` for the first."""
        commands: list[LoopCommand | None] = []
        try:
            commands.append(self._mailbox.get(timeout=wait_s) if wait_s > 0 else self._mailbox.get_nowait())
            while True:
                commands.append(self._mailbox.get_nowait())
        except queue.Empty:
            return commands

    def _flush(self, loop: InstanceLoop) -> None:
        if events := loop.take_events():
            self.call_soon(lambda: self._deliver_or_crash(events))

    def _deliver_or_crash(self, events: list[LoopEvent]) -> None:
        """An error is fatal: a lost event would leave a request without an answer, or blocks without an owner."""
        try:
            self._deliver(events)
        except Exception as error:
            log.exception("%s: an event could not be delivered", self._name)
            self._on_crash(error)

    def call_soon(self, call: Callable[[], object]) -> None:
        """Call on the event loop of `start`, in order with `deliver`. For the loop's thread."""
        assert self._event_loop is not None
        try:
            self._event_loop.call_soon_threadsafe(call)
        except RuntimeError:  # the event loop is closed, because the process ends
            log.debug("%s: an event came after the end", self._name)


def _settle(future: asyncio.Future[None], error: BaseException | None) -> None:
    if future.done():  # the waiting task was cancelled
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
