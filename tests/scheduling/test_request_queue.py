import math
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.request_slo import RequestSlo
from tandem.scheduling.request_queue import RequestQueue
from tandem.scheduling.routed_request import RoutedRequest
from tests.scheduling.routing_fakes import numbered_request


def _request(number: int, num_tokens: int = 10, client: str = "") -> RoutedRequest:
    return numbered_request(number, num_prompt_tokens=num_tokens, client=client)


def test_requests_leave_the_queue_without_assertions() -> None:
    """`python -O` leaves out assert statements, so none may have an effect."""
    script = """
from tandem.scheduling.request_queue import RequestQueue
from tandem.scheduling.routed_request import RoutedRequest
queue, request = RequestQueue(), RoutedRequest("r", num_prompt_tokens=1, max_tokens=1, received_s=0.0)
queue.push(request, float("inf"), 0.0)
queue.dispatch(request, 0.0)
raise SystemExit(queue.first(0.0) is not None)
"""
    path = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-O", "-c", script], check=True, env=os.environ | {"PYTHONPATH": path})


def test_a_newcomer_waits_as_long_as_the_recent_rate_says() -> None:
    queue, requests = RequestQueue(), [_request(number) for number in range(40)]
    for request in requests:
        queue.push(request, math.inf, now_s=0.0)
    assert queue.expected_wait_s(0.0) == 0.0, "nothing is known of the rate"
    for second, request in enumerate(requests[:20], start=1):
        queue.dispatch(request, float(second))
    assert queue.expected_wait_s(20.0) == pytest.approx(20.0, rel=0.1)
    for step, request in enumerate(requests[20:30], start=1):  # ten times as fast as before
        queue.dispatch(request, 20.0 + step / 10)
    assert 3.0 < queue.expected_wait_s(21.0) < 9.0


def test_time_with_an_empty_queue_does_not_count() -> None:
    queue = RequestQueue()
    for start_s in (0.0, 1000.0):
        for number in range(5):
            queue.push(_request(number), math.inf, start_s)
        while (first := queue.first(0.0)) is not None:
            queue.dispatch(first, start_s + 1.0 + first.number)
    for number in range(10):
        queue.push(_request(number), math.inf, 2000.0)
    assert queue.expected_wait_s(2000.0) == pytest.approx(10.0, rel=0.1)


def _dispatch_all(queue: RequestQueue) -> list[RoutedRequest]:
    dispatched = []
    while (first := queue.first(0.0)) is not None:
        queue.dispatch(first, 0.0)
        dispatched.append(first)
    return dispatched


def test_a_client_with_many_requests_delays_no_other() -> None:
    queue = RequestQueue()
    for number in range(100):
        queue.push(_request(number, client="greedy"), math.inf, 0.0)
    for number in range(100, 103):
        queue.push(_request(number, client="modest"), math.inf, 0.0)
    clients = [request.client for request in _dispatch_all(queue)]
    assert clients[:6].count("modest") == 3
    assert clients[6:] == ["greedy"] * 97


def test_long_prompts_count_as_much_as_they_cost() -> None:
    queue = RequestQueue()
    for number in range(10):
        queue.push(_request(number, 100, client="long"), math.inf, 0.0)
        queue.push(_request(100 + number, 10, client="short"), math.inf, 0.0)
    assert [request.client for request in _dispatch_all(queue)[:11]].count("short") == 10


def test_absence_earns_a_client_no_credit() -> None:
    queue = RequestQueue()
    for number in range(50):
        queue.push(_request(number, client="steady"), math.inf, 0.0)
    for _ in range(30):
        first = queue.first(0.0)
        assert first is not None
        queue.dispatch(first, 0.0)
    for number in range(100, 110):
        queue.push(_request(number, client="late"), math.inf, 0.0)
    assert [request.client for request in _dispatch_all(queue)[:10]].count("late") in (5, 6)


def test_the_expected_wait_counts_the_share_of_the_client() -> None:
    queue, requests = RequestQueue(), [_request(number, client="greedy") for number in range(120)]
    for request in requests:
        queue.push(request, math.inf, now_s=0.0)
    for second, request in enumerate(requests[:20], start=1):
        queue.dispatch(request, float(second))
    assert queue.expected_wait_s(20.0, _request(200, client="greedy")) == pytest.approx(100.0, rel=0.1)
    assert queue.expected_wait_s(20.0, _request(200, client="modest")) == pytest.approx(1.0, rel=0.1)


@given(
    st.lists(
        st.tuples(st.sampled_from(["push", "dispatch", "discard", "pass"]), st.integers(0, 9), st.floats(0, 20)),
        max_size=60,
    )
)
def test_order_sums_and_timeouts_match_the_waiting_requests(script: list[tuple[str, int, float]]) -> None:
    queue, now_s = RequestQueue(), 0.0
    requests = [_request(number, 1 + number) for number in range(10)]
    waiting: dict[int, float] = {}
    for action, number, amount in script:
        if action == "pass":
            now_s += amount
            ended = {each.number for each in queue.pop_impatient(now_s)}
            assert ended == {each for each, until_s in waiting.items() if until_s <= now_s}
            waiting = {each: until_s for each, until_s in waiting.items() if each not in ended}
        elif action == "push" and number not in waiting:
            waiting[number] = now_s + amount
            queue.push(requests[number], waiting[number], now_s)
        elif action == "dispatch" and waiting:
            first = queue.first(now_s)
            assert first is not None
            assert first.number == min(waiting)
            del waiting[first.number]
            queue.dispatch(first, now_s)
        elif action == "discard":
            waiting.pop(number, None)
            queue.discard(requests[number], now_s)
        assert len(queue) == len(waiting)
        assert queue.num_tokens == sum(1 + each for each in waiting)
        assert queue.next_end_s == min(waiting.values(), default=math.inf)
        assert 0.0 <= queue.expected_wait_s(now_s) < math.inf


class _ComparesEach(RequestQueue):
    """Takes no short cut."""

    def _all_in_time(self, *_: object) -> bool:
        return False

    def _tokens_before(self, newcomer: RoutedRequest) -> int:
        level = self._levels.get(newcomer.slo.priority)
        if level is None:
            return 0
        return sum(each.num_tokens for each in level.timely.requests() if each.due_s <= newcomer.due_s)


@given(
    requests=st.lists(
        st.tuples(st.integers(1, 500), st.sampled_from([0.5, 2.0, 100.0]), st.integers(0, 3), st.booleans()),
        min_size=2,
        max_size=40,
    ),
    token_s=st.sampled_from([0.0, 1e-4, 1e-2]),
)
def test_sums_give_the_same_answers_as_comparing_each_request(
    requests: list[tuple[int, float, int, bool]], token_s: float
) -> None:
    """A new request comes, some that wait are dispatched, and now and then one has been served."""
    queue, reference, now_s = RequestQueue("goodput"), _ComparesEach("goodput"), 0.0
    for number, (num_tokens, ttft_s, num_dispatched, is_served) in enumerate(requests):
        now_s += 0.03
        slo = RequestSlo("a", ttft_s, 0.1)
        newcomer = numbered_request(number, num_prompt_tokens=num_tokens, slo=slo, received_s=now_s)
        assert queue.leaves_out(newcomer, now_s) == reference.leaves_out(newcomer, now_s)
        assert queue.expected_wait_s(now_s, newcomer) == pytest.approx(reference.expected_wait_s(now_s, newcomer))
        for each in (queue, reference):
            each.push(newcomer, math.inf, now_s)
            if is_served:
                each.first_token_time.observe(num_tokens, token_s * num_tokens)
        for _ in range(num_dispatched):
            first = queue.first(now_s)
            assert first is reference.first(now_s)
            if first is not None:
                now_s += 0.001
                queue.dispatch(first, now_s)
                reference.dispatch(first, now_s)
