"""How old a step may become before it counts as stalled, and before it counts as hung."""

import pytest

from tandem.core.clock import ManualClock
from tandem.worker.progress import LOOK_EVERY_S, StallDetector, StepProgress


class Bench:
    def __init__(self) -> None:
        self.clock = ManualClock()
        self.progress = StepProgress(self.clock)
        self.detector = StallDetector(self.progress, self.clock)

    def compute(self, size: int, step_s: float) -> None:
        """One step, and the end of the turn."""
        self.progress.begin(size)
        self.clock.advance(step_s)
        self.progress.end()

    def look_for(self, seconds: float) -> None:
        for _ in range(round(seconds / LOOK_EVERY_S)):
            self.clock.advance(LOOK_EVERY_S)
            self.detector.look()


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_short_steps_may_take_a_second(bench: Bench) -> None:
    bench.compute(1, 0.002)
    assert bench.progress.limit_s(1) == 1.0


def test_a_slow_instance_may_take_ten_times_its_longest_recent_step(bench: Bench) -> None:
    bench.compute(8, 0.5)
    assert bench.progress.limit_s(8) == pytest.approx(5.0)
    assert bench.progress.limit_s(15) == pytest.approx(5.0), "of the same power of two"
    for _ in range(200):
        bench.compute(8, 0.2)
    assert bench.progress.limit_s(8) == pytest.approx(2.0), "the long one is not recent any more"


def test_a_smaller_step_has_no_more_time_than_its_own_size_needs(bench: Bench) -> None:
    bench.compute(2048, 3.0)
    bench.compute(4, 0.02)
    assert bench.progress.limit_s(4) == 1.0
    assert bench.progress.limit_s(2048) == pytest.approx(30.0)


def test_a_size_between_two_known_ones_has_the_time_of_the_larger(bench: Bench) -> None:
    bench.compute(2048, 3.0)
    bench.compute(4, 0.02)
    assert bench.progress.limit_s(256) == pytest.approx(30.0)


def test_first_steps_and_the_first_long_prompt_may_take_longer(bench: Bench) -> None:
    assert bench.progress.limit_s(1) == 10.0, "nothing was computed yet"
    bench.compute(1, 0.5)
    assert bench.progress.limit_s(4) == 10.0, "four tokens as one after the other take two seconds"
    assert bench.progress.limit_s(4096) == pytest.approx(0.5 * 4096)


def test_a_step_beyond_its_limit_counts_as_the_limit(bench: Bench) -> None:
    bench.compute(1, 0.002)
    bench.compute(1, 3600.0)
    assert bench.progress.limit_s(1) == pytest.approx(10.0)


def test_other_work_of_the_thread_says_nothing_of_the_first_step(bench: Bench) -> None:
    bench.compute(0, 1e-5)
    assert bench.progress.limit_s(0) == 1.0
    assert bench.progress.limit_s(1) == 10.0


def test_a_stalled_step_is_seen_and_its_end_too(bench: Bench) -> None:
    bench.compute(1, 0.002)
    bench.look_for(5.0)
    assert (bench.detector.age_s, bench.detector.is_stalled) == (0.0, False), "no step, no stall"
    bench.progress.begin(1)
    bench.look_for(0.9)
    assert not bench.detector.is_stalled
    assert bench.detector.age_s == pytest.approx(0.9)
    bench.look_for(0.2)
    assert bench.detector.is_stalled
    bench.progress.end()
    bench.look_for(0.1)
    assert not bench.detector.is_stalled


def test_steps_one_after_the_other_are_no_stall(bench: Bench) -> None:
    for _ in range(100):
        bench.progress.begin(0)
        bench.progress.begin(1)
        bench.look_for(0.5)
        bench.progress.end()
        assert not bench.detector.is_stalled


def test_a_stall_of_ten_limits_and_ten_seconds_is_a_hung_step(bench: Bench) -> None:
    bench.compute(1, 0.002)
    bench.progress.begin(1)
    bench.look_for(9.9)
    assert not bench.detector.is_hung
    bench.look_for(0.3)
    assert bench.detector.is_hung
    bench.progress.end()
    bench.compute(1, 2.0)
    bench.progress.begin(1)
    bench.look_for(199.0)
    assert not bench.detector.is_hung, "a limit of 20 s"
    bench.look_for(2.0)
    assert bench.detector.is_hung


def test_a_process_that_was_stopped_does_not_blame_its_step(bench: Bench) -> None:
    bench.compute(1, 0.002)
    bench.progress.begin(1)
    bench.look_for(0.3)
    bench.clock.advance(3600.0)  # SIGSTOP, or a machine that slept
    bench.detector.look()
    assert not bench.detector.is_stalled
    bench.progress.end()
    bench.look_for(0.1)
    assert not bench.detector.is_stalled
