"""The loop thread, with loops that count."""

import asyncio
import threading
from dataclasses import dataclass

import pytest

from tandem.core.clock import SystemClock
from tandem.core.errors import CheckpointError
from tandem.worker.loop_thread import LoopThread
from tandem.worker.progress import StepProgress


@dataclass
class Report:
    num_commands: int = 0
    is_empty: bool = True


class Doubler:
    """Each command is one step's work; its event is twice the command. -1 breaks it."""

    def __init__(self) -> None:
        self.thread = threading.current_thread().name
        self.pending: list[int] = []
        self.events: list[int] = []
        self.report = Report()

    def apply(self, command: int) -> None:
        self.pending.append(command)

    def prepare(self) -> bool:
        self.report = Report(self.report.num_commands + len(self.pending), is_empty=not self.pending)
        return bool(self.pending)

    step_size = 1
    has_steps = False
    is_full = True

    def launch(self) -> None:
        pass

    def collect(self) -> None:
        for command in self.pending:
            if command == -1:
                raise ZeroDivisionError
            self.events.append(2 * command)
        self.pending.clear()

    def idle(self) -> None:
        self.report = Report(self.report.num_commands)

    def take_events(self) -> list[int]:
        events, self.events = self.events, []
        return events


class Collector:
    def __init__(self) -> None:
        self.events: list[int] = []
        self.crash: BaseException | None = None
        self.news = asyncio.Event()

    def deliver(self, events: list[int]) -> None:
        self.events += events
        self.news.set()

    def crashed(self, error: BaseException) -> None:
        self.crash = error
        self.news.set()


async def test_commands_are_worked_off_in_order_on_the_loops_own_thread() -> None:
    loop, collector = Doubler(), Collector()

    def make() -> Doubler:
        loop.thread = threading.current_thread().name
        return loop

    thread: LoopThread = LoopThread("counting", make, collector.deliver, collector.crashed, StepProgress(SystemClock()))
    await thread.start()
    assert loop.thread == "counting"
    for number in range(100):
        thread.post(number)
    async with asyncio.timeout(5):
        while len(collector.events) < 100:
            collector.news.clear()
            await collector.news.wait()
    assert collector.events == [2 * number for number in range(100)]
    await thread.stop()
    thread.post(1)
    assert collector.crash is None


async def test_an_error_of_the_loop_is_reported() -> None:
    collector = Collector()
    thread: LoopThread = LoopThread(
        "breaking", Doubler, collector.deliver, collector.crashed, StepProgress(SystemClock())
    )
    await thread.start()
    thread.post(-1)
    async with asyncio.timeout(5):
        await collector.news.wait()
    assert isinstance(collector.crash, ZeroDivisionError)
    await thread.stop()


async def test_an_error_in_the_delivery_of_events_is_reported() -> None:
    collector = Collector()

    def deliver(events: list[int]) -> None:
        raise KeyError(events[0])

    thread: LoopThread = LoopThread("delivering", Doubler, deliver, collector.crashed, StepProgress(SystemClock()))
    await thread.start()
    thread.post(3)
    async with asyncio.timeout(5):
        await collector.news.wait()
    assert isinstance(collector.crash, KeyError)
    await thread.stop()


async def test_start_raises_the_error_of_making_the_loop() -> None:
    def make() -> Doubler:
        raise CheckpointError("no such model")

    collector = Collector()
    thread: LoopThread = LoopThread("unmade", make, collector.deliver, collector.crashed, StepProgress(SystemClock()))
    with pytest.raises(CheckpointError, match="no such model"):
        await thread.start()
    await thread.stop()


class Checked(Doubler):
    """Counts its self-checks."""

    def __init__(self) -> None:
        super().__init__()
        self.checks = 0
        self.checked = threading.Event()

    def idle(self) -> None:
        super().idle()
        self.checks += 1
        self.checked.set()


async def test_self_checks_come_once_after_the_work_and_not_between_two_turns_of_it() -> None:
    loop, collector = Checked(), Collector()
    thread: LoopThread = LoopThread(
        "checked", lambda: loop, collector.deliver, collector.crashed, StepProgress(SystemClock())
    )
    await thread.start()
    assert await asyncio.to_thread(loop.checked.wait, 5)
    await asyncio.sleep(0.05)
    assert loop.checks == 1, "nothing has happened since the first"
    loop.checked.clear()
    thread.post(1)
    assert await asyncio.to_thread(loop.checked.wait, 5)
    assert collector.events == [2], "the work came first"
    await thread.stop()
    assert loop.checks == 2


class Held(Doubler):
    """Takes nothing in hand before it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_begin = threading.Event()

    def apply(self, command: int) -> None:
        self.may_begin.wait(10)
        super().apply(command)


async def test_a_loop_is_not_idle_before_it_has_applied_what_was_posted() -> None:
    """A report that is older than a command says nothing about the command."""
    loop, collector = Held(), Collector()
    thread: LoopThread = LoopThread(
        "held", lambda: loop, collector.deliver, collector.crashed, StepProgress(SystemClock())
    )
    await thread.start()
    assert thread.is_idle
    thread.post(1)
    assert loop.report.is_empty
    assert not thread.is_idle
    await asyncio.sleep(0.05)
    assert not thread.is_idle
    loop.may_begin.set()
    async with asyncio.timeout(5):
        await collector.news.wait()
        while not thread.is_idle:  # noqa: ASYNC110 - a report has no event of its own
            await asyncio.sleep(0.01)
    await thread.stop()
