"""Requests that wait in the router because no instance has credit."""

import pytest

from tandem.core.errors import DeadlineError, OverloadedError, UnavailableError
from tandem.scheduling.routing_settings import RoutingSettings
from tests.scheduling.routing_fakes import DrivenRouter


def test_requests_without_credit_wait_in_order_of_arrival() -> None:
    router = DrivenRouter(RoutingSettings(max_outstanding_tokens=15))
    router.join("p1", "p2", "d1")
    requests = [router.ask(number) for number in range(7)]
    sent = [router.take() for _ in range(4)]
    assert sorted(each.instance_id for each in sent) == ["p1", "p1", "p2", "p2"]
    assert not router.sent
    router.start(sent[0], cached=8)
    assert router.take().source_id is not None
    assert router.take().attempt.request is requests[4]
    router.machine.cancel(requests[5], router.now_s)
    router.machine.instance_lost(sent[1].instance_id, router.now_s)
    assert set(router.ends) == set(), "the lost ones and the last one wait"
    router.first_token(sent[0])
    again = [router.take() for _ in range(len(router.sent))]
    numbers = [each.attempt.request.number for each in again if each.source_id is None]
    assert numbers == sorted(numbers)
    assert requests[6] not in [each.attempt.request for each in again], "those who came before are first"


def test_requests_that_wait_for_credit_can_lose_time_or_instances() -> None:
    router = DrivenRouter(RoutingSettings(max_outstanding_tokens=5, replacement_wait_s=2.0, max_attempts=1))
    router.join("p1", "d1")
    router.ask("a")
    router.start(router.take())  # what has not started does not count
    router.ask("b", deadline_s=1.0)
    router.ask("c")
    router.advance(1.0)
    assert isinstance(router.ends["b"], DeadlineError)
    router.machine.instance_removed("p1", router.now_s)
    assert isinstance(router.ends["a"], UnavailableError)
    assert router.take().attempt.hand_over, "a's"
    assert not router.take().attempt.hand_over, "c's, on the decode instance"


def test_no_prompt_is_computed_while_no_decode_instance_has_memory() -> None:
    router = DrivenRouter(RoutingSettings(max_outstanding_tokens=15))
    router.join("p1", "d1", "d2")
    requests = [router.ask(number) for number in range(9)]
    computed = []
    while router.sent:
        sent = router.take()
        if sent.source_id is None:
            router.start(sent)
            router.first_token(sent)
            computed.append(sent)
    assert len(computed) == 5, "two at each decode instance, and the one that the prefill instance had by then"
    assert sorted(instance.awaited_tokens for instance in router.machine.instances.values()) == [0, 20, 30]
    for sent in computed[:3]:
        router.machine.transfer_committed(sent.attempt, router.now_s)
    assert router.take().attempt.request is requests[5], "there is room again"


def test_long_answers_wait_for_decode_memory_in_the_router() -> None:
    """Otherwise a newcomer waits behind all of them at the instance, where no queue is fair between clients."""
    router = DrivenRouter(RoutingSettings(max_outstanding_tokens=1000))
    router.join("p1", "d1")  # memory for 1,024 tokens
    for number in range(640):
        router.ask(number, prompt=4, output=60)
    sent = [router.take() for _ in range(len(router.sent))]
    assert len(sent) == 24, "24 x 64 tokens are 1.5 times the memory"
    for each in sent:
        router.start(each)
        router.first_token(each)
    decoding = [router.take() for _ in range(len(router.sent))]
    assert [each.source_id for each in decoding] == ["p1"] * 24, "what decodes leaves no room for more prompts"
    router.machine.cancel(decoding[0].attempt.request, router.now_s)
    assert router.take().source_id is None
    assert not router.sent


def test_more_requests_are_admitted_when_answers_are_short() -> None:
    router = DrivenRouter(RoutingSettings(max_outstanding_tokens=1000))
    router.join("p1", "d1")
    for number in range(200):
        router.ask(number, prompt=4, output=200)
    assert len(router.sent) == 8
    most = 0
    for _ in range(150):
        most = max(most, router.machine.instances["p1"].open_requests + router.machine.instances["d1"].open_requests)
        sent = router.take()
        router.start(sent)
        router.first_token(sent)
        decoding = router.sent.pop(next(i for i, each in enumerate(router.sent) if each.source_id is not None))
        router.machine.transfer_committed(decoding.attempt, router.now_s)
        router.finish(decoding)
    assert most > 20, "answers of one token"


def test_a_request_that_would_wait_too_long_is_refused_at_once() -> None:
    router = DrivenRouter(RoutingSettings(max_outstanding_tokens=10, max_wait_s=40.0))
    router.join("p1", "d1")
    requests = [router.ask(number) for number in range(31)]
    refusals: list[OverloadedError] = []
    while not refusals:
        router.advance(1.0)
        router.first_token(router.take(), is_last=True)  # the instance takes a prompt a second
        for _ in range(2):
            try:
                requests.append(router.ask(len(requests)))
            except OverloadedError as error:
                refusals.append(error)
    assert len(router.machine._queue) == pytest.approx(30, abs=2), "30 s of work, which is 0.75 of the longest wait"
    assert 0 < refusals[0].retry_after_s < 3
    assert "about 3" in refusals[0].message
    for request in requests[-3:]:
        router.machine.cancel(request, router.now_s)
    with pytest.raises(OverloadedError, match="beyond its deadline"):
        router.ask("hurried", deadline_s=router.now_s + 5.0)
    router.ask("patient")


def test_a_request_that_has_waited_max_wait_s_is_refused() -> None:
    router = DrivenRouter(RoutingSettings(max_outstanding_tokens=10, max_wait_s=40.0))
    router.join("p1", "d1")
    router.ask("runs")
    router.ask("waits")
    router.advance(39.0)
    assert not router.ends
    router.advance(1.0)
    assert isinstance(router.ends["waits"], OverloadedError)
    assert "runs" not in router.ends
