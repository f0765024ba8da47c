"""Which instances a request gets, and the events of an attempt. tests/router has whole requests, through the wire."""

import pytest

from tandem.core.errors import ContextLengthError, InternalError, UnavailableError
from tandem.core.session import BlockCounts, Role
from tandem.scheduling.routing_settings import RoutingSettings
from tests.scheduling.routing_fakes import DrivenRouter

# --- a pair or one instance -------------------------------------------------------------------------------------------


def test_a_request_on_a_pair_leaves_no_load_behind() -> None:
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


def test_a_colocated_instance_computes_prompt_and_answer() -> None:
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


def test_the_least_work_decides_between_a_pair_and_a_colocated_instance() -> None:
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


def test_with_equal_work_the_lower_decode_load_decides() -> None:
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


def test_instances_without_memory_to_decode_are_passed_over() -> None:
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


def test_cached_prefixes_do_not_count_as_work() -> None:
    router = DrivenRouter()
    router.join("p1", "d1", "c1")
    for key in "ab":
        router.ask(key, prompt=64, tokens=(1, 2, 3, 4))
    owner = {router.take().instance_id for _ in range(2)}
    assert owner == {"p1", "c1"}
    router.ask("c", prompt=64, tokens=(1, 2, 3, 4))
    assert router.loads()["p1"][1] + router.loads()["c1"][1] == 3 * 64


def test_decode_instances_compute_prompts_without_a_prefill_instance() -> None:
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
    """The update replaces the prefill instance first. The old decode instance is then the only instance of its epoch,
    and does both phases."""
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


def test_an_instance_that_changes_its_role_keeps_its_attempts() -> None:
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


# --- how long a request may be ----------------------------------------------------------------------------------------


def test_long_answers_go_where_they_fit() -> None:
    """On an instance that is too small they would end early."""
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


def test_ended_plan_epochs_leave_no_state() -> None:
    router = DrivenRouter(RoutingSettings(max_outstanding_tokens=100))
    for epoch in range(3):
        router.join("p1", "d1", fingerprint=f"f@{epoch}")
        router.ask(epoch)
        for instance_id in ("p1", "d1"):
            router.machine.instance_removed(instance_id, router.now_s)
    selector = router.machine._selector
    assert [*selector._credit._free, *selector._credit._unplaced, *selector._decodes._groups] == []


# --- events that an instance should not send --------------------------------------------------------------------------


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


def test_a_request_that_ends_for_too_many_tokens_returns_its_credit() -> None:
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
