"""The live router and the simulator decide alike: a recorded run of the one, replayed through the other."""

import asyncio
from random import Random
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tandem.scheduling.routing_settings import RoutingSettings
from tests.conformance.live_run import KINDS, Ask, Recording, Trouble, run_live
from tests.conformance.replay import Replay
from tests.conformance.virtual_time import VirtualTimeLoop

_FLEETS = (("p1", "p2", "d1", "d2"), ("c1", "c2"), ("p1", "d1", "c1"), ("p1", "p2", "p3", "d1", "d2", "c1"))


def _seconds(low: float, high: float) -> st.SearchStrategy[float]:
    return st.integers(int(1000 * low), int(1000 * high)).map(lambda milliseconds: milliseconds / 1000)


_asks = st.builds(
    Ask,
    at_s=_seconds(0.0, 2.0),
    group=st.integers(0, 2),
    prefix_blocks=st.integers(0, 3),
    own_tokens=st.integers(1, 15),
    output_tokens=st.integers(1, 8),
    cancel_after_s=st.none() | st.none() | _seconds(0.01, 0.5),
)


@st.composite
def _troubles(draw: st.DrawFn, instance_ids: tuple[str, ...]) -> list[Trouble]:
    """At most one for each instance, since one ends before the next begins."""
    one = st.builds(
        Trouble,
        at_s=_seconds(0.0, 2.0),
        kind=st.sampled_from(KINDS),
        instance_id=st.sampled_from(instance_ids),
        lasts_s=_seconds(0.1, 4.0),
    )
    return draw(st.lists(one, max_size=3, unique_by=lambda trouble: trouble.instance_id))


@st.composite
def _scripts(draw: st.DrawFn) -> dict[str, Any]:
    instance_ids = draw(st.sampled_from(_FLEETS))
    return {
        "instance_ids": instance_ids,
        "asks": sorted(draw(st.lists(_asks, min_size=1, max_size=25)), key=lambda ask: ask.at_s),
        "troubles": draw(_troubles(instance_ids)),
        "routing": RoutingSettings(
            local_prefill=False,
            retry_pause_s=0.041,  # as long as some pairs of events are apart
            replacement_wait_s=draw(st.sampled_from([0.5317, 30.0])),
            max_outstanding_tokens=draw(st.sampled_from([None, None, 20, 60])),
            max_queue=draw(st.sampled_from([None, 12])),
            policy=draw(st.sampled_from(["balanced", "goodput"])),
        ),
        "request_timeout_s": draw(st.sampled_from([0.7531, 3.1317])),
        "seed": draw(st.integers(0, 1 << 16)),
    }


def live_run(script: dict[str, Any]) -> Recording:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(run_live(**script))


def assert_conforms(script: dict[str, Any]) -> Recording:
    live = live_run(script)
    replayed = Replay(
        live, script["instance_ids"], script["asks"], script["routing"], script["request_timeout_s"]
    ).run()
    assert [decision[1:] for decision in replayed.decisions] == [decision[1:] for decision in live.decisions]
    assert [decision[0] for decision in replayed.decisions] == pytest.approx(
        [decision[0] for decision in live.decisions]
    )
    failed = sum(decision[1] == "end" and decision[3] is not None for decision in live.decisions)
    assert replayed.num_refused == live.num_refused + failed
    return live


@settings(max_examples=100, deadline=None, phases=[Phase.generate])
@given(_scripts())
def test_a_recorded_run_is_decided_alike(script: dict[str, Any]) -> None:
    assert_conforms(script)


def test_what_the_scripts_do() -> None:
    """A long one has all that may happen: the property above is not empty."""
    asks = [
        Ask(0.02 * row, row % 3, row % 4, 1 + row % 15, 1 + row % 8, 0.2 if row % 9 == 0 else None)
        for row in range(200)
    ]
    troubles = [Trouble(0.3 + 0.4 * number, kind, f"p{1 + number % 3}", 1.0) for number, kind in enumerate(KINDS)]
    live = assert_conforms(
        {
            "instance_ids": _FLEETS[3],
            "asks": asks,
            "troubles": troubles,
            "routing": RoutingSettings(local_prefill=False, retry_pause_s=0.041, max_outstanding_tokens=100),
            "request_timeout_s": 0.3531,
            "seed": 1,
        }
    )
    kinds = {what for _, what, _ in live.events}
    assert kinds >= {"arrive", "event", "wake", "cancel", "instance_reported", "instance_lost", "instance_removed"}
    ends = {decision[3] and decision[3][0] for decision in live.decisions if decision[1] == "end"}
    assert ends >= {None, "deadline_exceeded", "invalid_request"}
    submitted = [decision for decision in live.decisions if decision[1] == "submit"]
    assert max(decision[4] for decision in submitted) == 3, "attempts"
    assert {decision[6][0] for decision in submitted} == {"p", "d", "c"}


@pytest.mark.parametrize("seed", range(6))
def test_requests_that_come_in_the_very_moment_of_a_retry(seed: int) -> None:
    """The order of the two decides who gets the instance."""
    random = Random(seed)
    lost_s, retry_pause_s = random.randrange(200, 1000) / 1000, 0.041

    def ask(at_s: float) -> Ask:
        return Ask(
            at_s, random.randrange(3), random.randrange(4), 1 + random.randrange(15), 1 + random.randrange(8), None
        )

    asks = [ask(random.randrange(int(1000 * lost_s)) / 1000) for _ in range(15)]
    asks += [ask(round(lost_s + retry_pause_s, 3)) for _ in range(3)]
    assert_conforms(
        {
            "instance_ids": _FLEETS[0],
            "asks": sorted(asks, key=lambda each: each.at_s),
            "troubles": [Trouble(lost_s, random.choice(["break", "gone"]), "p1", 1.0)],
            "routing": RoutingSettings(local_prefill=False, retry_pause_s=retry_pause_s),
            "request_timeout_s": 3.1317,
            "seed": seed,
        }
    )
