"""What the router's requests leave in its workload profile."""

from random import Random

import pytest

from tandem.core.clock import SystemClock
from tandem.core.errors import OverloadedError
from tandem.core.timeline import Stage, Timeline
from tandem.core.workload_profile import WorkloadProfile
from tandem.router.profile import ProfileObserver
from tandem.router.records import RequestRecord
from tandem.scheduling.routing_settings import RoutingSettings
from tests.router.fakes import make_request, running_cluster


def make_profile() -> WorkloadProfile:
    return WorkloadProfile(window_s=10.0, random=Random(0), now_s=0.0, capacity=16, min_requests=1)


def record(num_output_tokens: int, outcome: str = "length") -> RequestRecord:
    timeline = Timeline(
        {Stage.RECEIVED: 1.0, Stage.FINISHED: 4.0},
        num_prompt_tokens=20,
        num_cached_tokens=16,
        num_output_tokens=num_output_tokens,
    )
    return RequestRecord("r", outcome, None, timeline, ())


def test_an_answer_counts_as_long_as_it_became() -> None:
    profile = make_profile()
    observer = ProfileObserver(profile)
    observer.finished(record(5))
    observer.finished(record(2, "cancelled"))
    observer.finished(record(0, "deadline_exceeded"))
    snapshot = profile.snapshot(11.0)
    assert snapshot is not None
    assert snapshot.finished == 2
    assert snapshot.prompt_tokens == (20, 20)
    assert snapshot.output_tokens == (5, 2)
    assert snapshot.cached_tokens == (16, 16)


async def test_a_refused_request_has_arrived_too() -> None:
    profile = WorkloadProfile(window_s=1e-9, random=Random(0), now_s=SystemClock().now_s(), min_requests=1)
    observer = ProfileObserver(profile)
    async with running_cluster("p1", "d1", routing=RoutingSettings(max_queue=2), profile=observer) as cluster:
        running = [cluster.start(make_request(f"r{i}")) for i in range(2)]
        with pytest.raises(OverloadedError):
            cluster.start(make_request("r2"))
        for each in running:
            await each.aclose()
        observer.finished(record(1))  # closes the window
        snapshot = profile.snapshot(SystemClock().now_s() + 1.0)
        assert snapshot is not None
        assert snapshot.arrivals == 3
