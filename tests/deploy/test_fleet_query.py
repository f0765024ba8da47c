"""Waiting until a router knows its instances."""

from collections.abc import Iterator
from typing import Any

import pytest

from tandem.core.clock import ManualClock
from tandem.core.errors import DeadlineError, TandemError, UnavailableError
from tandem.core.session import InstanceState, Role
from tandem.deploy import fleet_query
from tandem.wire.fleet import FleetDescription
from tests.instance_status import make_status


def _fleet(state: InstanceState) -> FleetDescription:
    return FleetDescription("tiny", 1.0, (make_status("p1", Role.PREFILL, state=state),), 0, 0)


async def test_a_router_that_starts_or_is_slow_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: Iterator[FleetDescription | TandemError] = iter(
        [
            UnavailableError("it starts"),
            DeadlineError("no core"),
            _fleet(InstanceState.LOADING),
            _fleet(InstanceState.READY),
        ]
    )

    async def describe(*_: Any) -> FleetDescription:
        answer = next(answers)
        if isinstance(answer, TandemError):
            raise answer
        return answer

    monkeypatch.setattr(fleet_query, "describe_fleet", describe)
    await fleet_query.wait_registered("127.0.0.1:1", None, None, lambda: {"p1"}, ManualClock())
    assert next(answers, None) is None


async def test_instances_that_never_come_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ManualClock()

    async def describe(*_: Any) -> FleetDescription:
        clock.advance(10.0)
        return _fleet(InstanceState.READY)

    monkeypatch.setattr(fleet_query, "describe_fleet", describe)
    with pytest.raises(UnavailableError, match="do not reach the router"):
        await fleet_query.wait_registered("127.0.0.1:1", None, None, lambda: {"p1", "d1"}, clock)
