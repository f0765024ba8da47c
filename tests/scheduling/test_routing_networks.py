"""Links that have failed, and readers of KV that are lost."""

import pytest

from tandem.core.errors import StaleEpochError, TransferError, UnavailableError
from tandem.core.session import BlockCounts
from tandem.scheduling.routing_settings import RoutingPolicy, RoutingSettings
from tests.scheduling.routing_fakes import STEP_COST, DrivenRouter, Sent


def _report(router: DrivenRouter, name: str, **changes: object) -> None:
    """p1 and d1 are on one host, p2 and d2 on another; p2 and d1 are busy."""
    busy: dict[str, object] = {
        "p2": {"uncomputed_tokens": 900},
        "d1": {"blocks": BlockCounts(total=64, free=40, running=24, cached=0, leased=0)},
    }
    address = f"10.0.0.{name[1]}:{1000 + ord(name[0])}"
    router.join(name, address=address, step_cost=STEP_COST, **busy.get(name, {}), **changes)  # type: ignore[arg-type]


def _two_hosts(policy: RoutingPolicy) -> DrivenRouter:
    router = DrivenRouter(RoutingSettings(policy=policy, local_prefill=False))
    for name in ("p1", "p2", "d1", "d2"):
        _report(router, name)
    return router


def _begin(router: DrivenRouter, key: object) -> tuple[Sent, Sent]:
    router.ask(key)
    first = router.take()
    router.start(first)
    return first, router.take()


def _pairs(router: DrivenRouter, count: int) -> list[tuple[str, str]]:
    """Of some requests, one after the other."""
    found = []
    for number in range(count):
        first, second = _begin(router, number)
        found.append((first.instance_id, second.instance_id))
        router.machine.cancel(first.attempt.request, router.now_s)
    return found


@pytest.mark.parametrize("is_computed", [False, True])
@pytest.mark.parametrize("policy", ["balanced", "goodput"])
def test_after_a_link_has_failed_kv_is_read_on_its_own_host(policy: RoutingPolicy, is_computed: bool) -> None:
    """No prompt is computed again. The pair in the other direction needs the same network and is not tried."""
    router = _two_hosts(policy)
    first, second = _begin(router, "r")
    assert (first.instance_id, second.instance_id) == ("p1", "d2")
    if is_computed:
        router.first_token(first)
    router.fail(second, UnavailableError("the prefill worker cannot be reached"))
    again = router.take()
    assert (again.attempt, again.instance_id, again.source_id) == (first.attempt, "d1", "p1")
    assert first.attempt.request.num_attempts == 2
    assert not router.cancelled
    if not is_computed:
        router.first_token(first)
    router.machine.transfer_committed(again.attempt, router.now_s)
    router.machine.tokens_generated(again.attempt, 4, router.now_s)
    router.finish(again)
    assert not any(any(load) for load in router.loads().values())
    assert set(_pairs(router, 8)) == {("p1", "d1")}
    router.machine.instance_lost("p1", router.now_s)
    assert set(_pairs(router, 8)) == {("p2", "d2")}


@pytest.mark.parametrize("is_computed", [False, True])
@pytest.mark.parametrize("policy", ["balanced", "goodput"])
def test_after_a_decode_instance_is_lost_another_one_reads_the_kv(policy: RoutingPolicy, is_computed: bool) -> None:
    router = _two_hosts(policy)
    _report(router, "p1", lease_s=30.0)
    first, second = _begin(router, "r")
    if is_computed:
        router.first_token(first)
    router.lose(second.instance_id)
    again = router.take()
    assert (again.attempt, again.instance_id, again.source_id) == (first.attempt, "d1", "p1")
    assert first.attempt.request.num_attempts == 2
    assert not router.cancelled
    assert isinstance(first.attempt.reader_error, UnavailableError)
    if not is_computed:
        router.first_token(first)
    router.advance(60.0)
    assert {(handle, where) for handle, where, _ in router.renewed} == {(first.attempt.handle, "p1")}
    router.commit(again)
    router.machine.tokens_generated(again.attempt, 4, router.now_s)
    router.finish(again)
    assert not any(any(load) for load in router.loads().values())


@pytest.mark.parametrize("is_computed", [False, True])
def test_kv_is_released_when_its_last_possible_reader_is_lost(is_computed: bool) -> None:
    router = DrivenRouter(RoutingSettings(local_prefill=False))
    router.join("p1", "d1", lease_s=1.0)
    first, second = _begin(router, "r")
    if is_computed:
        router.first_token(first)
    router.lose("d1")
    assert router.cancelled == [(first.attempt.handle, "p1")]
    router.advance(1.0)
    assert not router.renewed
    router.machine.instance_connected("d1", router.now_s)
    assert (router.take().instance_id, second.attempt.prefill) == ("p1", None)


def test_a_host_that_is_lost_as_a_whole_uses_up_one_attempt() -> None:
    """Its instances are lost one after the other: the KV was left to another reader in vain."""
    router = _two_hosts("balanced")
    first, second = _begin(router, "r")
    router.lose(second.instance_id)
    assert router.take().instance_id == "d1"
    router.lose(first.instance_id)
    again = router.take()
    assert (again.instance_id, again.attempt.request.num_attempts) == ("p2", 2)


def test_kv_that_a_lost_reader_has_acknowledged_is_computed_again_at_once() -> None:
    """No instance is blamed, and the request loses no attempt."""
    router = DrivenRouter(RoutingSettings(local_prefill=False))
    router.join("p1", "d1", "d2")
    first, second = _begin(router, "r")
    router.first_token(first)
    router.lose(second.instance_id)
    router.fail(router.take(), StaleEpochError("the KV was fetched already"))
    again = router.take()
    assert (again.instance_id, again.attempt.request.num_attempts) == ("p1", 2)
    assert (first.attempt.handle, "p1") in router.cancelled


@pytest.mark.parametrize("policy", ["balanced", "goodput"])
def test_a_link_that_is_reported_lost_is_not_used(policy: RoutingPolicy) -> None:
    """However long ago it was reported, and before any request has failed because of it."""
    router = _two_hosts(policy)
    assert set(_pairs(router, 4)) == {("p1", "d2")}
    _report(router, "d2", unreachable_peers=("p1",))
    router.now_s += 3600.0
    assert set(_pairs(router, 4)) == {("p1", "d1")}
    router.machine.instance_lost("p2", router.now_s)
    router.machine.instance_lost("d1", router.now_s)
    with pytest.raises(UnavailableError, match="whose KV a ready decode worker can read"):
        router.ask("r")
    for name in ("p2", "d1"):
        router.machine.instance_connected(name, router.now_s)
    _report(router, "d2")
    router.now_s += 3600.0
    assert set(_pairs(router, 4)) == {("p1", "d2")}


def test_an_instance_that_its_own_host_cannot_reach_is_avoided_by_all() -> None:
    """Both are on one host, so the instance itself does not answer: no reader on another host is tried either."""
    router = DrivenRouter()
    for number, name in enumerate(("p1", "p2", "d1", "d2")):
        router.join(name, address=f"10.0.0.1:{1000 + number}")
    _report(router, "d1", unreachable_peers=("p1",))
    assert {prefill for prefill, _ in _pairs(router, 6)} == {"p2"}
    router.machine.instance_lost("p2", router.now_s)
    assert {prefill for prefill, _ in _pairs(router, 2)} == {"p1"}, "where there is no other"
    router.machine.instance_connected("p2", router.now_s)
    _report(router, "d1")
    assert {prefill for prefill, _ in _pairs(router, 6)} == {"p1", "p2"}


def test_without_any_link_decode_instances_compute_prompts() -> None:
    router = DrivenRouter()
    router.join("p1", "d1")
    router.join("d1", unreachable_peers=("p1",))
    router.ask(0)
    sent = router.take()
    assert (sent.instance_id, sent.attempt.hand_over) == ("d1", False)
    router.join("d1")
    router.ask(1)
    assert router.take().instance_id == "p1"


def test_a_suspect_link_is_used_where_there_is_no_other() -> None:
    """The failure may have had another reason: no instance reports that the link is lost."""
    router = _two_hosts("balanced")
    router.machine.instance_lost("p2", router.now_s)
    router.machine.instance_lost("d1", router.now_s)
    _, second = _begin(router, "r")
    router.fail(second, TransferError("the KV did not arrive in time"))
    router.advance(1.0)
    again = router.take()
    assert again.instance_id == "p1"
    router.start(again)
    assert router.take().instance_id == "d2"


def test_a_lost_instance_makes_no_link_suspect() -> None:
    router = _two_hosts("balanced")
    router.join("p3", address="10.0.0.1:1003")
    _report(router, "d2", unreachable_peers=("p1",))
    router.machine.instance_lost("p1", router.now_s)
    assert set(_pairs(router, 4)) == {("p3", "d2")}
