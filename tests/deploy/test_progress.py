"""Which processes count as stalled: with scripted answers on a clock of the test's own, and with real ones."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tandem.core.clock import SystemClock
from tandem.deploy.progress import Activity, Patience, ThreadActivity, wait_stalled

PATIENCE = Patience()


class Story:
    """A process whose answers and activity follow from the time. An answer comes at once, a missing one after
    `probe_s`. At `pause_at_s` the observer itself is stopped for a minute; it is late by `late_s` in each round."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.time_s = 0.0
        self.answers: Callable[[float], bool | None] = lambda _: True
        self.activity: Callable[[float], Activity] = lambda _: Activity.WAITING
        self.draining: Callable[[float], bool] = lambda _: False
        self.pause_at_s = float("inf")
        self.late_s = 0.0
        monkeypatch.setattr("tandem.deploy.progress.asyncio.sleep", self.sleep)

    def now_s(self) -> float:
        return self.time_s

    async def sleep(self, seconds: float) -> None:
        self.time_s += seconds + self.late_s
        if self.time_s > self.pause_at_s:
            self.time_s, self.pause_at_s = self.time_s + 60, float("inf")
        if self.time_s > 300:
            raise TimeoutError("never")

    async def ask(self) -> bool | None:
        answer = self.answers(self.time_s)
        if answer is None:
            self.time_s += PATIENCE.probe_s
        return answer

    async def end(self) -> tuple[float, str]:
        """When it is found, and why. Raises TimeoutError if it never is."""
        reason = await wait_stalled(
            self.ask,
            lambda: self.activity(self.time_s),
            lambda: self.draining(self.time_s),
            self,
            PATIENCE,
        )
        return self.time_s, reason


@pytest.fixture
def story(monkeypatch: pytest.MonkeyPatch) -> Story:
    return Story(monkeypatch)


async def test_a_healthy_process_is_left_alone(story: Story) -> None:
    with pytest.raises(TimeoutError):
        await story.end()


async def test_a_stopped_process_is_found_within_two_seconds(story: Story) -> None:
    story.answers = lambda time_s: True if time_s < 10 else None
    story.activity = lambda time_s: Activity.WAITING if time_s < 10 else Activity.STOPPED
    time_s, reason = await story.end()
    assert 10 < time_s < 12
    assert reason.startswith("it is stopped, as by SIGSTOP")


async def test_a_hung_process_is_found(story: Story) -> None:
    story.answers = lambda time_s: True if time_s < 10 else None
    time_s, reason = await story.end()
    assert 9.5 + PATIENCE.silence_s <= time_s < 12
    assert "has not answered for" in reason
    assert "computes nothing" in reason


async def test_a_slow_process_gets_time(story: Story) -> None:
    story.answers = lambda time_s: None if 10 < time_s < 10 + PATIENCE.busy_s - 1 else True
    story.activity = lambda _: Activity.COMPUTING
    with pytest.raises(TimeoutError):
        await story.end()


async def test_but_not_for_ever(story: Story) -> None:
    story.answers = lambda time_s: True if time_s < 10 else None
    story.activity = lambda _: Activity.COMPUTING
    time_s, reason = await story.end()
    assert PATIENCE.busy_s <= time_s - 9.5 < PATIENCE.busy_s + 2
    assert reason.startswith("it has not answered for 1")


async def test_what_says_that_it_is_ill_is_replaced(story: Story) -> None:
    story.answers = lambda time_s: time_s < 10
    time_s, reason = await story.end()
    assert PATIENCE.not_serving_s <= time_s - 9.5 < PATIENCE.not_serving_s + 1
    assert "that it makes no progress" in reason


async def test_being_ill_now_and_then_is_none(story: Story) -> None:
    story.answers = lambda time_s: time_s % 6 > 4
    with pytest.raises(TimeoutError):
        await story.end()


async def test_what_drains_is_not_asked(story: Story) -> None:
    story.answers = lambda time_s: True if time_s < 10 else None
    story.draining = lambda time_s: time_s >= 10
    with pytest.raises(TimeoutError):
        await story.end()


async def test_nobody_is_blamed_for_a_pause_of_the_observer(story: Story) -> None:
    """It was stopped for a minute, and the process answers only a second after it: both were stopped."""
    story.pause_at_s = 10.0
    story.answers = lambda time_s: None if 69 < time_s < 71 else True
    with pytest.raises(TimeoutError):
        await story.end()


@pytest.mark.parametrize("activity", [Activity.STOPPED, Activity.WAITING])
@pytest.mark.parametrize("late_s", [0.3, 0.6, 1.0])
async def test_an_observer_that_is_always_late_finds_it_all_the_same(
    late_s: float, activity: Activity, story: Story
) -> None:
    story.late_s = late_s
    story.answers = lambda time_s: True if time_s < 10 else None
    story.activity = lambda time_s: Activity.WAITING if time_s < 10 else activity
    time_s, _ = await story.end()
    assert 10 < time_s < 12 + 4 * late_s


@contextmanager
def _python(code: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


async def test_what_a_real_process_does() -> None:
    """By the kernel: one that computes in a thread, one that waits, one that is stopped, one that has ended."""
    computes = "import threading\nprint(flush=True)\nthreading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()"
    with _python(computes) as busy, _python("import time; print(flush=True); time.sleep(100)") as idle:
        of_busy, of_idle = ThreadActivity(busy.pid), ThreadActivity(idle.pid)
        await _until(of_busy, Activity.COMPUTING)
        await _until(of_idle, Activity.WAITING)
        os.kill(busy.pid, signal.SIGSTOP)
        await _until(of_busy, Activity.STOPPED)
    assert of_busy.read() is Activity.WAITING


async def _until(process: ThreadActivity, activity: Activity) -> None:
    async with asyncio.timeout(10):
        while process.read() is not activity:  # noqa: ASYNC110 - the kernel tells no event
            await asyncio.sleep(0.05)


async def test_the_clock_of_the_system_will_do() -> None:
    """A process that never answers, on real time."""

    async def ask() -> None:
        await asyncio.sleep(0.01)

    limits = Patience(period_s=0.01, probe_s=0.02, silence_s=0.2)
    async with asyncio.timeout(10):
        reason = await wait_stalled(ask, lambda: Activity.WAITING, lambda: False, SystemClock(), limits)
    assert "computes nothing" in reason
