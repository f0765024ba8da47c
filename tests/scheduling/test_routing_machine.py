"""The router's decisions, event by event. The order of a whole request is tested in tests/router, through the wire."""

import math
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.errors import (
    ContextLengthError,
    DeadlineError,
    IncompatiblePeerError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    StaleEpochError,
    TransferError,
    UnavailableError,
)
from tandem.core.session import BlockCounts, InstanceState, Role
from tandem.scheduling.goodput_selector import GoodputSelector
from tandem.scheduling.routing_settings import RoutingPolicy, RoutingSettings
from tests.scheduling.routing_fakes import STEP_COST, DrivenRouter, Sent, make_status

# --- forms -----------------------------------------------------------------------------------------------------------


def test_a_pair_then_a_finish_leaves_nothing() -> None:
    router = DrivenRouter()
    router.join("p1", "d1")
    router.ask("r")
    first = router.take()
    assert (first.instance_id, first.source_id, first.attempt.hand_over) == ("p1", None, True)
    assert not router.sent, "a decode instance is chosen only when prefill starts"
    assert router.start(first, cached=4)
    second = router.take()
    assert (second.instance_id, second.source_id) == ("d1", "p1")
    assert router.loads() == {"p1": (1, 6, 16), "d1": (1, 0, 16)}
    assert router.first_token(first)
    assert router.machine.transfer_committed(first.attempt, 0.0)
    assert router.loads()["p1"] == (0, 0, 0)
    assert router.machine.tokens_generated(first.attempt, 4, router.now_s)
    assert router.finish(second)
    assert router.ends == {"r": None}
    assert router.loads() == {"p1": (0, 0, 0), "d1": (0, 0, 0)}
    assert not router.cancelled
    assert not router.finish(second), "late events are dropped"
    assert not router.start(first)


def test_a_colocated_instance_does_it_all() -> None:
    router = DrivenRouter()
    router.join("c1")
    router.ask("r")
    sent = router.take()
    assert (sent.instance_id, sent.attempt.hand_over) == ("c1", False)
    router.start(sent)
    router.first_token(sent)
    assert router.loads() == {"c1": (1, 0, 16)}
    assert router.machine.tokens_generated(sent.attempt, 4, router.now_s)
    assert router.finish(sent)
    assert (router.ends, router.loads()) == ({"r": None}, {"c1": (0, 0, 0)})
    assert not router.sent


def test_the_form_with_the_least_work_is_taken() -> None:
    router = DrivenRouter()
    router.join("p1", "d1", "c1")
    router.ask("a", prompt=100)
    router.ask("b", prompt=50)
    router.ask("c", prompt=10)  # behind b: 50 + 10
    router.ask("d", prompt=10)  # behind b and c
    taken = [router.take() for _ in range(4)]
    assert taken[0].instance_id == "c1"
    assert [sent.instance_id for sent in taken[1:]] == ["p1", "p1", "p1"]
    selection = taken[1].selection
    assert selection is not None
    assert "c1" in selection.explain()
    assert "colocated: 100 tokens more to compute before the first token" in selection.explain()


def test_of_forms_with_equal_work_the_less_loaded_one_is_taken() -> None:
    router = DrivenRouter()
    router.join("p1", "d1", "c1")
    taken = []
    for number in range(4):
        router.ask(number)
        sent = router.take()
        taken.append(sent.instance_id)
        router.start(sent)
        router.first_token(sent)
        router.sent.clear()
    assert taken == ["c1", "p1", "c1", "p1"]
    assert sent.selection is not None
    assert "colocated: as much to compute before the first token, decoding more loaded by" in sent.selection.explain()


def test_a_form_without_memory_to_decode_is_passed_over() -> None:
    router = DrivenRouter()
    full = BlockCounts(total=64, free=0, running=64, cached=0, leased=0)
    router.join("p1", "c1")
    router.join("d1", blocks=full)
    router.ask("a", prompt=100)
    router.ask("b", prompt=100)
    assert [router.take().instance_id for _ in range(2)] == ["c1", "c1"]
    router.join("d1")
    router.join("d1")
    router.ask("c", prompt=100)
    assert router.take().instance_id == "p1"


def test_a_prefix_that_a_colocated_instance_has_is_no_work() -> None:
    router = DrivenRouter()
    router.join("p1", "d1", "c1")
    for key in "ab":
        router.ask(key, prompt=64, tokens=(1, 2, 3, 4))
    owner = {router.take().instance_id for _ in range(2)}
    assert owner == {"p1", "c1"}
    router.ask("c", prompt=64, tokens=(1, 2, 3, 4))
    assert router.loads()["p1"][1] + router.loads()["c1"][1] == 3 * 64


def test_decode_instances_compute_prompts_while_nobody_else_can() -> None:
    router = DrivenRouter()
    router.join("d1")
    router.ask("a")
    sent = router.take()
    assert (sent.instance_id, sent.source_id, sent.attempt.hand_over) == ("d1", None, False)
    router.first_token(sent)
    router.finish(sent)
    router.join("p1")
    router.ask("b")
    assert router.take().instance_id == "p1"
    router.machine.instance_removed("p1", router.now_s)
    sent = router.take()
    assert (sent.instance_id, sent.attempt.hand_over) == ("d1", False), "degraded service instead of none"
    refusing = DrivenRouter(RoutingSettings(local_prefill=False))
    refusing.join("d1")
    with pytest.raises(UnavailableError, match="no prefill worker is ready"):
        refusing.ask("a")


def test_old_and_new_instances_of_a_rolling_update_form_no_pairs() -> None:
    """The update replaces the prefill instance first. The old decode instance, alone of its epoch, does both phases."""
    router = DrivenRouter()
    router.join("p1", "d1", fingerprint="f@old")
    router.join("p2", fingerprint="f@new")
    for key in "ab":
        router.ask(key)
        assert router.take().instance_id == "p1", "the only one with a decode instance of its epoch"
    router.machine.instance_removed("p1", router.now_s)
    sent = [router.take() for _ in "ab"]
    assert {(each.instance_id, each.attempt.hand_over) for each in sent} == {("d1", False)}
    router.join("d2", fingerprint="f@new")
    router.ask("c")
    sent_new = router.take()
    assert (sent_new.instance_id, sent_new.attempt.hand_over) == ("p2", True)
    router.start(sent_new)
    decode = router.take()
    assert (decode.instance_id, decode.source_id) == ("d2", "p2")


def test_an_instance_that_changes_its_role_keeps_what_it_has() -> None:
    router = DrivenRouter()
    router.join("p1", "p2", "d1")
    for key in "ab":
        router.ask(key)
    a, b = router.take(), router.take()
    assert {a.instance_id, b.instance_id} == {"p1", "p2"}
    router.join(a.instance_id, role=Role.DECODE)
    assert router.loads()[a.instance_id] == (1, 10, 16)
    router.ask("c")
    assert router.take().instance_id == b.instance_id, "it is no prefill instance any more"
    assert router.start(a)
    assert router.take().instance_id == "d1", "no instance reads its own KV"
    assert router.start(b)
    assert router.take().instance_id == a.instance_id
    assert router.first_token(a)
    router.join(a.instance_id, role=Role.COLOCATED, block_size=32)
    router.ask("d")
    assert router.take().instance_id == a.instance_id


# --- capacity --------------------------------------------------------------------------------------------------------


def test_long_answers_go_where_they_fit() -> None:
    """Fault D3: they ended early, on an instance that was too small."""
    router = DrivenRouter()
    router.join("p1")
    router.join("p2", max_model_len=100)
    router.join("d1", max_model_len=100)
    router.join("d2")
    router.join("c1", max_model_len=60)
    assert router.machine.capacity_tokens() == 256
    for number in range(4):
        router.ask(number, prompt=20, output=200)
        sent = router.take()
        assert sent.instance_id == "p1"
        router.start(sent)
        assert router.take().instance_id == "d2"
    router.machine.instance_removed("d2", router.now_s)
    assert router.machine.capacity_tokens() == 100
    assert {router.take().instance_id for _ in range(4)} <= {"p1", "p2"}, "where most of it fits"
    with pytest.raises(ContextLengthError, match="at most 100"):
        router.ask("long", prompt=100)


def test_plan_epochs_that_are_over_leave_nothing() -> None:
    router = DrivenRouter(RoutingSettings(max_outstanding_tokens=100))
    for epoch in range(3):
        router.join("p1", "d1", fingerprint=f"f@{epoch}")
        router.ask(epoch)
        for instance_id in ("p1", "d1"):
            router.machine.instance_removed(instance_id, router.now_s)
    selector = router.machine._selector
    assert [*selector._credit._room, *selector._credit._unplaced, *selector._decodes._groups] == []


# --- instances that say what cannot be, or say it again --------------------------------------------------------------


def test_a_preempted_prompt_that_starts_again_counts_once() -> None:
    router = DrivenRouter()
    router.join("p1", "d1")
    router.ask("r")
    sent = router.take()
    for _ in range(2):
        assert router.start(sent, cached=4)
    assert [each.instance_id for each in router.sent] == ["d1"]
    assert router.loads()["p1"] == (1, 6, 16)


def test_a_second_first_token_ends_the_attempt_at_its_instance() -> None:
    router = DrivenRouter()
    router.join("c1")
    router.ask("r")
    sent = router.take()
    router.start(sent)
    assert router.first_token(sent)
    assert not router.first_token(sent)
    assert isinstance(router.ends["r"], InternalError)
    assert router.cancelled == [(sent.attempt.handle, "c1")], "what goes on there is wanted by nobody"


def test_too_many_tokens_make_room_for_those_that_wait() -> None:
    router = DrivenRouter(RoutingSettings(max_outstanding_tokens=1000))
    router.join("c1")  # memory for 1,024 tokens
    requests = [router.ask(number, prompt=4, output=60) for number in range(25)]
    sent = [router.take() for _ in range(24)]
    for each in sent:
        router.start(each)
        router.first_token(each)
    assert not router.sent
    assert not router.machine.tokens_generated(sent[0].attempt, 60, router.now_s)
    assert isinstance(router.ends[0], InternalError)
    assert router.take().attempt.request is requests[24]


# --- credit ----------------------------------------------------------------------------------------------------------


def test_beyond_their_credit_requests_wait_first_come_first_served() -> None:
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


def test_what_waits_for_credit_can_run_out_of_time_or_instances() -> None:
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


def test_no_prompt_is_computed_while_no_decode_instance_has_room() -> None:
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


def test_long_answers_wait_for_memory_in_the_router_where_waiting_is_fair() -> None:
    """40 clients asked for 16 long answers to short prompts each. All were sent, and one more client waited."""
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


def test_answers_that_turn_out_short_let_more_in() -> None:
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


def test_who_would_wait_for_too_long_is_refused_at_once() -> None:
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


def test_who_has_waited_for_too_long_is_told_so() -> None:
    router = DrivenRouter(RoutingSettings(max_outstanding_tokens=10, max_wait_s=40.0))
    router.join("p1", "d1")
    router.ask("runs")
    router.ask("waits")
    router.advance(39.0)
    assert not router.ends
    router.advance(1.0)
    assert isinstance(router.ends["waits"], OverloadedError)
    assert "runs" not in router.ends


# --- failures --------------------------------------------------------------------------------------------------------


def _lone_pair(**changes: object) -> tuple[DrivenRouter, Sent]:
    router = DrivenRouter(RoutingSettings(local_prefill=False, **changes))  # type: ignore[arg-type]
    router.join("p1", "d1")
    router.ask("r")
    return router, router.take()


def test_a_request_waits_for_a_replacement_as_long_as_it_is_allowed() -> None:
    """Fault C7: it gave up after 1 s, while a replacement came after 3.3 s."""
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


def test_a_deadline_ends_what_waits_for_a_replacement() -> None:
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


def test_it_goes_back_to_the_only_instance_after_a_pause() -> None:
    router, sent = _lone_pair(retry_pause_s=0.5)
    router.fail(sent, UnavailableError("out of memory"))
    router.advance(0.4)
    assert not router.sent
    router.advance(0.2)
    assert router.take().instance_id == "p1"


def test_a_full_fleet_refuses() -> None:
    router = DrivenRouter()
    router.join("p1", "p2", "d1")
    router.ask("r")
    error = OverloadedError("the queue is full")
    router.fail(router.take(), error)
    router.fail(router.take(), error)
    assert router.ends == {"r": error}


def test_faults_of_the_request_are_final() -> None:
    router, sent = _lone_pair()
    error = InvalidRequestError("bad")
    router.fail(sent, error)
    assert router.ends == {"r": error}


def test_a_pair_that_cannot_link_is_not_chosen_again_and_again() -> None:
    """Fault C6: each request tried it anew."""
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


def test_many_deaths_at_once_use_up_no_attempts() -> None:
    """The router hears of them one after the other, and sends each request to the next dead one meanwhile."""
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


def test_a_prefill_instance_that_decode_cannot_reach_is_left() -> None:
    """Its session stands, so only what decode says tells: another attempt at it would fail as well."""
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


def test_a_prefill_instance_that_can_link_to_nobody_is_passed_over() -> None:
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
    """Though its instances go on with others, and however long ago they met."""
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


def test_instances_of_which_none_can_read_the_others_kv_serve_as_well_as_they_can() -> None:
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


# --- a network that is cut -------------------------------------------------------------------------------------------


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
def test_after_a_cut_the_kv_is_read_on_its_own_host(policy: RoutingPolicy, is_computed: bool) -> None:
    """No prompt is computed again, and the mirrored pair, whose link needs the same network, is not tried."""
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
def test_after_the_loss_of_its_reader_another_one_reads_the_kv(policy: RoutingPolicy, is_computed: bool) -> None:
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
def test_kv_whose_last_possible_reader_is_lost_is_given_up(is_computed: bool) -> None:
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


def test_kv_that_its_lost_reader_had_taken_is_computed_again_at_once() -> None:
    """Nobody else is to blame, and it uses up no attempt of the request."""
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
    """However long ago that was, and before any request has met it."""
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


def test_what_its_own_host_cannot_reach_is_passed_over() -> None:
    """No network is between the two, so the instance itself does not answer: no other reader is tried with it."""
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


def test_a_network_that_has_failed_is_used_where_there_is_no_other() -> None:
    """It may have been for another reason, and nobody reports that it is lost."""
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


def test_a_prefill_instance_that_is_lost_makes_no_network_suspect() -> None:
    router = _two_hosts("balanced")
    router.join("p3", address="10.0.0.1:1003")
    _report(router, "d2", unreachable_peers=("p1",))
    router.machine.instance_lost("p1", router.now_s)
    assert set(_pairs(router, 4)) == {("p3", "d2")}


@pytest.mark.parametrize("policy", ["balanced", "goodput"])
def test_an_instance_that_failed_others_is_passed_over_for_a_while(policy: RoutingPolicy) -> None:
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


# --- other routers' load ---------------------------------------------------------------------------------------------


def test_a_router_that_is_alone_sees_no_foreign_load() -> None:
    """Fault C9: the report is older than events that came before it."""
    router = DrivenRouter()
    router.join("p1", "d1")
    router.ask("a", prompt=100)
    sent = router.take()
    router.start(sent)
    router.first_token(sent)
    router.machine.transfer_committed(sent.attempt, router.now_s)
    router.finish(sent)
    late = make_status("p1", uncomputed_tokens=100, running_requests=1)
    router.machine.instance_reported(late, router.now_s)
    assert router.machine.instances["p1"].queued_tokens == 0
    blocks = BlockCounts(total=64, free=57, running=7, cached=0, leased=0)
    router.machine.instance_reported(make_status("d1", blocks=blocks, running_requests=1), router.now_s)
    view = router.machine.instances["d1"].decode_view()
    assert (view.claimed_tokens, view.sequences) == (0, 0)
    for _ in range(2):  # what is there still is others'
        router.machine.instance_reported(late, router.now_s)
    assert router.machine.instances["p1"].queued_tokens == 100


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["ask", "done", "seen", "describe", "report"]), st.integers(0, 3)), max_size=60)
)
def test_whatever_the_delays_own_work_is_never_foreign(script: list[tuple[str, int]]) -> None:
    """The instance computes before its event is seen, and a report is read some time after what it describes."""
    router = DrivenRouter(RoutingSettings(retry_pause_s=0.0))
    router.join("p1", "d1")
    there: list[Sent] = []  # not computed
    unseen: list[Sent] = []
    described = 0
    for number, (kind, which) in enumerate(script):
        if kind == "ask":
            router.ask(number, prompt=7 + which)
            there.append(router.take())
        elif kind == "done" and there:
            unseen.append(there.pop(which % len(there)))
        elif kind == "seen" and unseen:
            router.first_token(unseen.pop(which % len(unseen)), is_last=True)
        elif kind == "describe":  # between the last report and the next
            described = sum(sent.attempt.num_tokens for sent in there)
        else:
            router.machine.instance_reported(make_status("p1", uncomputed_tokens=described), router.now_s)
            described = sum(sent.attempt.num_tokens for sent in there)
        instance = router.machine.instances["p1"]
        assert instance.queued_tokens == instance.uncomputed_tokens


# --- any order of events ---------------------------------------------------------------------------------------------

_ERRORS = (
    TransferError("torn"),
    StaleEpochError("the KV was fetched already"),
    UnavailableError("gone"),
    OverloadedError("full"),
    IncompatiblePeerError("other"),
)
_IDS = ("p1", "p2", "d1", "d2", "c1")
_KINDS = [
    "ask",
    "ask",
    "start",
    "first",
    "commit",
    "tokens",
    "finish",
    "fail",
    "lose",
    "join",
    "role",
    "drain",
    "wait",
    "cancel",
]


@settings(max_examples=200, deadline=None)
@given(
    script=st.lists(
        st.tuples(
            st.sampled_from(_KINDS),
            st.integers(0, 30),
        ),
        max_size=80,
    ),
    credit=st.sampled_from([None, 5, 25]),
    wait_s=st.sampled_from([0.5, math.inf]),
    local=st.booleans(),
    policy=st.sampled_from(["balanced", "goodput"]),
)
def test_whatever_happens_each_request_ends_once_and_nothing_is_left(
    script: list[tuple[str, int]], credit: int | None, wait_s: float, local: bool, policy: RoutingPolicy
) -> None:
    settings = RoutingSettings(max_outstanding_tokens=credit, max_wait_s=wait_s, local_prefill=local, policy=policy)
    router = DrivenRouter(settings)
    router.join(*_IDS, step_cost=STEP_COST)
    machine, asked, sent, cancelled = router.machine, list[object](), list[Sent](), set[object]()
    requests = {}
    for number, (kind, which) in enumerate(script):
        router.now_s += 0.01
        router.advance(0.0)
        sent += router.sent
        router.sent.clear()
        name = _IDS[which % len(_IDS)]
        if kind == "ask":
            deadline_s = router.now_s + (0.5 if which % 3 == 0 else math.inf)
            with suppress(UnavailableError, OverloadedError):
                requests[number] = router.ask(number, prompt=5 + which, output=1 + which % 6, deadline_s=deadline_s)
                asked.append(number)
        elif kind == "lose":
            router.lose(name)
        elif kind == "join":
            router.join(name)
        elif kind == "role":
            router.join(name, role=list(Role)[which % 3])
        elif kind == "drain":
            router.join(name, state=InstanceState.DRAINING)
        elif kind == "wait":
            router.advance(0.06 if which % 2 else 1.0)
        elif kind == "cancel" and asked:
            key = asked[which % len(asked)]
            if key not in router.ends:
                cancelled.add(key)
            machine.cancel(requests[key], router.now_s)
        elif sent:
            one = sent[which % len(sent)]
            left = one.attempt.request.max_tokens - one.attempt.request.num_output_tokens
            if kind == "start":
                router.start(one, cached=which)
            elif kind == "first" and left > 0 and not one.attempt.has_first_token:
                if router.first_token(one, is_last=left == 1) and left == 1:
                    router.there.discard((one.attempt.handle, one.instance_id))
            elif kind == "commit" and one.attempt.decode is machine.instances[one.instance_id]:
                router.commit(one)
            elif kind == "tokens" and one.attempt.has_first_token and left > 1:
                machine.tokens_generated(one.attempt, 1, router.now_s)
            elif kind == "finish" and one.attempt.generating is machine.instances[one.instance_id]:
                if one.attempt.has_first_token:
                    router.there.discard((one.attempt.handle, one.instance_id))
                    router.finish(one)
            elif kind == "fail":
                router.fail(one, _ERRORS[which % len(_ERRORS)])
        for request in requests.values():
            assert request.num_attempts <= router.settings.max_attempts
        known = {(each.handle, name) for name, known in machine.instances.items() for each in known.attempts()}
        assert router.there <= known, "an instance holds blocks for an attempt that the router has forgotten"
    for key in asked:
        if key not in router.ends and key not in cancelled:
            machine.cancel(requests[key], router.now_s)
            cancelled.add(key)
    assert set(router.ends) | cancelled == set(asked)
    assert not machine._requests
    assert set(router.loads().values()) <= {(0, 0, 0)}
    assert not any(instance.waiting_tokens for instance in machine.instances.values())
    assert machine._queue.num_tokens == 0
    assert not any(instance.expected_tokens for instance in machine.instances.values())
    machine._selector._credit.check_integrity()
    assert not machine._selector._credit._unplaced.total()
    if isinstance(selector := machine._selector, GoodputSelector):
        assert not selector._coming
        for load in selector._loads.values():
            assert (load.decoding, load.context_tokens, load.queued_tokens) == (0, 0, 0)
            assert load.queued_s == pytest.approx(0.0, abs=1e-9)
    router.advance(100.0)
    assert len(machine._deadlines) == len(machine._waiting._recovering) == len(machine._queue) == 0
