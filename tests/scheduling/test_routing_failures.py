"""What becomes of a request whose attempt has failed."""

import pytest

from tandem.core.errors import (
    DeadlineError,
    IncompatiblePeerError,
    InvalidRequestError,
    OverloadedError,
    TransferError,
    UnavailableError,
)
from tandem.scheduling.routing_settings import RoutingPolicy, RoutingSettings
from tests.scheduling.routing_fakes import STEP_COST, DrivenRouter, Sent


def _lone_pair(**changes: object) -> tuple[DrivenRouter, Sent]:
    router = DrivenRouter(RoutingSettings(local_prefill=False, **changes))  # type: ignore[arg-type]
    router.join("p1", "d1")
    router.ask("r")
    return router, router.take()


def test_a_request_waits_replacement_wait_s_for_another_instance() -> None:
    """A process that is started again takes several seconds to load."""
    router, _ = _lone_pair()
    router.machine.instance_removed("p1", router.now_s)
    router.advance(3.3)
    assert not router.ends
    router.join("p2")
    assert router.take().instance_id == "p2"
    router.machine.instance_removed("p2", router.now_s)
    router.advance(29.0)
    assert not router.ends
    router.advance(2.0)
    error = router.ends["r"]
    assert isinstance(error, UnavailableError)
    assert error.message == "no prefill worker is ready"


def test_a_deadline_ends_the_wait_for_another_instance() -> None:
    router = DrivenRouter(RoutingSettings(local_prefill=False))
    router.join("p1", "d1")
    router.ask("r", deadline_s=4.0)
    router.machine.instance_lost("p1", 1.0)
    router.advance(3.9)
    assert not router.ends
    router.advance(0.2)
    assert isinstance(router.ends["r"], DeadlineError)
    router.join("p1")
    assert len(router.sent) == 1


def test_a_request_is_retried_on_the_only_instance_after_a_pause() -> None:
    router, sent = _lone_pair(retry_pause_s=0.5)
    router.fail(sent, UnavailableError("out of memory"))
    router.advance(0.4)
    assert not router.sent
    router.advance(0.2)
    assert router.take().instance_id == "p1"


def test_a_request_is_refused_when_all_instances_are_full() -> None:
    router = DrivenRouter()
    router.join("p1", "p2", "d1")
    router.ask("r")
    error = OverloadedError("the queue is full")
    router.fail(router.take(), error)
    router.fail(router.take(), error)
    assert router.ends == {"r": error}


def test_an_invalid_request_is_not_retried() -> None:
    router, sent = _lone_pair()
    error = InvalidRequestError("bad")
    router.fail(sent, error)
    assert router.ends == {"r": error}


def test_a_pair_whose_transfer_failed_is_avoided_for_a_while() -> None:
    """Not each request finds out by itself."""
    router = DrivenRouter()
    router.join("p1", "p2", "d1", "d2")
    broken = {"p1", "d1"}
    failed = 0
    for number in range(20):
        router.now_s += 0.1
        request = router.ask(number)
        while True:
            first = router.take()
            router.start(first)
            second = router.take()
            if {first.instance_id, second.instance_id} != broken:
                break
            failed += 1
            router.fail(second, TransferError("no link"))
        router.first_token(first)
        router.machine.transfer_committed(first.attempt, router.now_s)
        router.finish(second)
        assert request.key in router.ends
    assert failed <= 2
    router.advance(60.0)
    assert not router.machine._selector.failures.current(router.now_s), "all is forgiven"


def test_attempts_at_instances_that_were_lost_already_do_not_count() -> None:
    """When many instances end at once, the router hears of them one after the other, and sends requests to the next of
    them meanwhile."""
    router = DrivenRouter()
    names = [f"p{number}" for number in range(8)]
    router.join(*names, "d1")
    request = router.ask(0)
    first = router.take()
    router.start(first)
    router.take()
    dead = first.instance_id
    for _ in names:
        router.machine.instance_lost(dead, router.now_s)
        dead = router.take().instance_id
    assert dead == "d1", "it does both"
    assert request.key not in router.ends


def test_a_prefill_instance_that_decode_cannot_reach_is_avoided() -> None:
    """Its session to the router still works, so only the decode instance notices. A second attempt there would fail."""
    router = DrivenRouter()
    router.join("p1", "p2", "d1", "d2")
    router.ask(0)
    first = router.take()
    router.ask(1)
    assert router.take().instance_id != first.instance_id, "the other one has something to do now"
    router.start(first)
    second = router.take()
    router.fail(second, UnavailableError("the prefill worker cannot be reached"))
    again = router.take()
    assert again.instance_id != first.instance_id
    router.start(again)
    assert router.take().instance_id != second.instance_id


def test_a_prefill_instance_without_a_compatible_reader_is_passed_over() -> None:
    router = DrivenRouter()
    router.join("p1", "p2", "d1")
    router.ask(0)
    first = router.take()
    router.start(first)
    router.fail(router.take(), IncompatiblePeerError("no link"))
    router.machine.cancel(first.attempt.request, router.now_s)
    router.sent.clear()
    for number in range(1, 5):
        router.ask(number)
        assert router.take().instance_id != first.instance_id


@pytest.mark.parametrize("policy", ["balanced", "goodput"])
def test_a_pair_that_cannot_exchange_kv_is_not_chosen_again(policy: RoutingPolicy) -> None:
    """However much time has passed. Both instances still form pairs with others."""
    router = DrivenRouter(RoutingSettings(policy=policy))
    router.join("p1", "p2", "d1", "d2", step_cost=STEP_COST)
    pairs = []
    for number in range(40):
        router.now_s += 10.0
        router.ask(number)
        while number not in router.ends:
            first = router.take()
            router.start(first)
            second = router.take()
            pairs.append((first.instance_id, second.instance_id))
            if pairs[-1] == ("p1", "d1"):
                router.fail(second, IncompatiblePeerError("no transport in common"))
                continue
            router.first_token(first)
            router.machine.transfer_committed(first.attempt, router.now_s)
            router.finish(second)
    assert pairs.count(("p1", "d1")) == 1
    assert {("p1", "d2"), ("p2", "d1"), ("p2", "d2")} <= set(pairs)


def test_a_decode_instance_computes_prompts_when_all_pairs_are_incompatible() -> None:
    router = DrivenRouter()
    router.join("p1", "d1")
    router.ask(0)
    first = router.take()
    router.start(first)
    router.fail(router.take(), IncompatiblePeerError("no transport in common"))
    alone = router.take()
    assert (alone.instance_id, alone.attempt.hand_over) == ("d1", False), "it computes the prompt itself"
    router.join("d2")
    router.ask(1)
    later = router.take()
    assert later.instance_id == "p1"
    router.start(later)
    assert router.take().instance_id == "d2"
    router.machine.instance_removed("d1", router.now_s)
    router.machine.instance_removed("d2", router.now_s)
    router.sent.clear()
    router.join("d1")  # of that name, but another
    router.ask(2)
    assert "p1" in {sent.instance_id for sent in router.sent}


@pytest.mark.parametrize("policy", ["balanced", "goodput"])
def test_an_instance_with_recent_failures_is_avoided_for_a_while(policy: RoutingPolicy) -> None:
    router = DrivenRouter(RoutingSettings(policy=policy))
    router.join("p1", "p2", "d1", step_cost=STEP_COST)
    router.ask(0)
    first = router.take()
    router.fail(first, UnavailableError("out of memory"))
    router.machine.cancel(first.attempt.request, router.now_s)
    router.sent.clear()
    for number in range(1, 4):
        request = router.ask(number)
        sent = router.take()
        assert sent.instance_id != first.instance_id
        assert sent.selection is not None
        assert policy == "goodput" or "requests failed there recently" in sent.selection.explain()
        router.machine.cancel(request, router.now_s)
    router.advance(60.0)
    taken = set()
    for number in range(4, 6):
        router.ask(number)
        taken.add(router.take().instance_id)
    assert taken == {"p1", "p2"}
