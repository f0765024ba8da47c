"""Leases on KV that waits for its reader."""

import math

import pytest

from tandem.core.session import Role
from tandem.scheduling.routing_settings import RoutingSettings
from tests.scheduling.routing_fakes import DrivenRouter


def test_a_lease_is_renewed_as_long_as_its_reader_waits() -> None:
    router = DrivenRouter()
    router.join("p0", lease_s=30.0)
    router.join("d0", role=Role.DECODE)
    router.ask("a")
    prefill = router.take()
    router.start(prefill)
    router.first_token(prefill)
    router.advance(35.0)
    handle = prefill.attempt.handle
    assert router.renewed == [(handle, "p0", 10.0), (handle, "p0", 20.0), (handle, "p0", 30.0)]
    router.machine.transfer_committed(prefill.attempt, router.now_s)
    router.advance(60.0)
    assert len(router.renewed) == 3, "the reader has the KV"


@pytest.mark.parametrize("end", ["cancelled", "lost", "too late"])
def test_no_lease_is_renewed_for_a_request_that_has_ended(end: str) -> None:
    router = DrivenRouter(RoutingSettings(max_attempts=1))
    router.join("p0", lease_s=30.0)
    router.join("d0", role=Role.DECODE)
    request = router.ask("a", deadline_s=15.0 if end == "too late" else math.inf)
    prefill = router.take()
    router.start(prefill)
    router.first_token(prefill)
    router.advance(12.0)
    assert len(router.renewed) == 1
    if end == "cancelled":
        router.machine.cancel(request, router.now_s)
    elif end == "lost":
        router.machine.instance_lost("d0", router.now_s)
    router.advance(60.0)
    assert len(router.renewed) == 1
    assert not any(open_requests for open_requests, _, _ in router.loads().values())
