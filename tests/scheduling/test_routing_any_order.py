"""Events in any order."""

import math
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.errors import IncompatiblePeerError, OverloadedError, StaleEpochError, TransferError, UnavailableError
from tandem.core.session import InstanceState, Role
from tandem.scheduling.goodput_selector import GoodputSelector
from tandem.scheduling.routing_settings import RoutingPolicy, RoutingSettings
from tests.scheduling.routing_fakes import STEP_COST, DrivenRouter, Sent

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
    script=st.lists(st.tuples(st.sampled_from(_KINDS), st.integers(0, 30)), max_size=80),
    credit=st.sampled_from([None, 5, 25]),
    wait_s=st.sampled_from([0.5, math.inf]),
    local=st.booleans(),
    policy=st.sampled_from(["balanced", "goodput"]),
)
def test_each_request_ends_once_and_leaves_no_state(
    script: list[tuple[str, int]], credit: int | None, wait_s: float, local: bool, policy: RoutingPolicy
) -> None:
    routing = RoutingSettings(max_outstanding_tokens=credit, max_wait_s=wait_s, local_prefill=local, policy=policy)
    router = DrivenRouter(routing)
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
            chosen = sent[which % len(sent)]
            left = chosen.attempt.request.max_tokens - chosen.attempt.request.num_output_tokens
            if kind == "start":
                router.start(chosen, cached=which)
            elif kind == "first" and left > 0 and not chosen.attempt.has_first_token:
                if router.first_token(chosen, is_last=left == 1) and left == 1:
                    router.there.discard((chosen.attempt.handle, chosen.instance_id))
            elif kind == "commit" and chosen.attempt.decode is machine.instances[chosen.instance_id]:
                router.commit(chosen)
            elif kind == "tokens" and chosen.attempt.has_first_token and left > 1:
                machine.tokens_generated(chosen.attempt, 1, router.now_s)
            elif kind == "finish" and chosen.attempt.generating is machine.instances[chosen.instance_id]:
                if chosen.attempt.has_first_token:
                    router.there.discard((chosen.attempt.handle, chosen.instance_id))
                    router.finish(chosen)
            elif kind == "fail":
                router.fail(chosen, _ERRORS[which % len(_ERRORS)])
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
        assert not selector._unplaced
        for load in selector._loads.values():
            assert (load.decoding, load.context_tokens, load.queued_tokens) == (0, 0, 0)
            assert load.queued_s == pytest.approx(0.0, abs=1e-9)
    router.advance(100.0)
    assert len(machine._deadlines) == len(machine._waiting._recovering) == len(machine._queue) == 0
