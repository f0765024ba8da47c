"""How long a stopped process counts as stopped, to an observer that may be late itself."""

import pytest

from tandem.worker.ranks import child
from tandem.worker.ranks.child import StoppedTimes
from tandem.worker.ranks.peer import STOPPED_S

EVERY_S = 0.2
PID = 7


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Ids of the processes that are stopped now."""
    pids: set[int] = set()
    monkeypatch.setattr(child, "is_stopped", pids.__contains__)
    return pids


@pytest.mark.parametrize("every_s", [0.2, 0.3, 0.45, 0.7])
def test_a_stopped_process_is_found_however_late_the_looks_are(every_s: float, stopped: set[int]) -> None:
    """Each look adds something, and none begins anew: at the most two looks more than without a delay."""
    times, now_s = StoppedTimes(EVERY_S), 0.0
    for _ in range(5):
        times.look([PID], now_s)
        now_s += every_s
    assert times.of(PID) == 0.0
    stopped.add(PID)
    looks = 0
    while times.of(PID) < STOPPED_S:
        times.look([PID], now_s)
        now_s += every_s
        looks += 1
    assert looks * every_s < 2 * STOPPED_S + 2 * every_s


def test_what_was_stopped_together_with_the_observer_is_not_lost(stopped: set[int]) -> None:
    """As by Ctrl-Z, where the observer may run again a moment before the others."""
    times = StoppedTimes(EVERY_S)
    times.look([PID], 0.0)
    stopped.add(PID)
    times.look([PID], 60.0)
    assert times.of(PID) == 0.0
    times.look([PID], 120.0)
    assert times.of(PID) < STOPPED_S
    stopped.clear()
    times.look([PID], 120.2)
    assert times.of(PID) == 0.0
    assert times.observed_s == pytest.approx(1.0)


def test_looks_that_follow_each_other_at_once_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    monkeypatch.setattr(child, "is_stopped", lambda pid: looked.append(pid))
    times = StoppedTimes(EVERY_S)
    for number in range(1000):
        times.look([PID], 0.001 * number)
    assert len(looked) == 10
