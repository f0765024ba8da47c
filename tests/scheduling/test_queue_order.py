"""Orders of the router's queue: who is dispatched next, who is left out, and that nobody starves."""

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.request_slo import NO_SLO, RequestSlo
from tandem.scheduling.queue_order import Job, QueueOrder, left_out
from tandem.scheduling.request_queue import FAIR_TOKENS, RequestQueue
from tandem.scheduling.routed_request import RoutedRequest
from tandem.scheduling.tenant_ledger import OUTPUT_WEIGHT
from tests.scheduling.routing_fakes import numbered_request

JOBS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12)), max_size=8)


def _request(
    number: int,
    ttft_s: float = math.inf,
    *,
    tokens: int = 100,
    tenant: str = "",
    priority: int = 0,
    received_s: float = 0.0,
) -> RoutedRequest:
    slo = NO_SLO if ttft_s == math.inf and not priority else RequestSlo("c", ttft_s, priority=priority)
    return numbered_request(number, num_prompt_tokens=tokens, client=tenant, slo=slo, received_s=received_s)


def _queue(order: QueueOrder, *requests: RoutedRequest, tokens_per_s: float | None = None) -> RequestQueue:
    """With a measured rate if one is given."""
    queue = RequestQueue(order)
    if tokens_per_s is not None:
        for second in range(60):
            queue.push(_request(-1 - second, tokens=int(tokens_per_s)), math.inf, second - 60.0)
            if second:
                first = queue.first(second - 60.0)
                assert first is not None
                queue.dispatch(first, second - 60.0)
        for _ in range(len(queue)):
            queue.discard(queue.first(0.0) or requests[0], 0.0)
    for request in requests:
        queue.push(request, math.inf, 0.0)
    return queue


def _numbers(queue: RequestQueue, now_s: float = 0.0, step_s: float = 0.0) -> list[int]:
    """In the order of dispatch, `step_s` after each other."""
    numbers = []
    while (first := queue.first(now_s)) is not None:
        queue.dispatch(first, now_s)
        numbers.append(first.number)
        now_s += step_s
    return numbers


def _num_on_time(jobs: list[Job], chosen: tuple[int, ...]) -> bool:
    end_s = 0.0
    for index in sorted(chosen, key=lambda index: jobs[index].due_s):
        end_s += jobs[index].service_s
        if end_s > jobs[index].due_s:
            return False
    return True


@given(JOBS)
def test_as_few_are_left_out_as_by_brute_force(numbers: list[tuple[int, int]]) -> None:
    jobs = [Job(float(due_s), float(service_s)) for due_s, service_s in numbers]
    out = left_out(jobs, 0.0)
    assert _num_on_time(jobs, tuple(set(range(len(jobs))) - out)), "those that are kept are on time"
    best = max(
        size
        for size in range(len(jobs) + 1)
        if any(_num_on_time(jobs, chosen) for chosen in combinations(range(len(jobs)), size))
    )
    assert len(jobs) - len(out) == best


@given(JOBS, st.lists(st.floats(0.1, 10), min_size=8, max_size=8), st.floats(0, 40))
def test_kept_jobs_are_on_time_whatever_the_weights(
    numbers: list[tuple[int, int]], weights: list[float], now_s: float
) -> None:
    jobs = [Job(float(due_s), float(service_s), weights[i]) for i, (due_s, service_s) in enumerate(numbers)]
    kept = tuple(set(range(len(jobs))) - left_out(jobs, now_s))
    assert _num_on_time([job._replace(due_s=job.due_s - now_s) for job in jobs], kept)


def test_the_heavier_of_two_that_cannot_both_be_on_time_is_kept() -> None:
    assert left_out([Job(10, 8, weight=1), Job(10, 8, weight=3)], 0.0) == {0}


@pytest.mark.parametrize(
    ("order", "numbers"), [("fcfs", [0, 1, 2, 3]), ("edf", [3, 1, 0, 2]), ("goodput", [3, 1, 0, 2])]
)
def test_orders(order: QueueOrder, numbers: list[int]) -> None:
    targets = (9.0, 5.0, math.inf, 2.0)
    queue = _queue(order, *(_request(number, ttft_s) for number, ttft_s in enumerate(targets)))
    assert _numbers(queue) == numbers


def test_goodput_leaves_out_the_long_one_that_edf_makes_all_others_late_for() -> None:
    def waiting() -> list[RoutedRequest]:
        return [_request(0, 5.0, tokens=450), *(_request(number, 5.5, tokens=100) for number in range(1, 6))]

    assert _numbers(_queue("edf", *waiting(), tokens_per_s=100)) == [0, 1, 2, 3, 4, 5]
    assert _numbers(_queue("goodput", *waiting(), tokens_per_s=100)) == [1, 2, 3, 4, 5, 0]


def test_a_request_that_is_late_already_makes_no_other_late() -> None:
    queue = _queue("goodput", _request(0, 1.0), _request(1, 9.0))
    assert _numbers(queue, now_s=2.0) == [1, 0]


def test_a_request_that_was_left_out_returns_when_there_is_time() -> None:
    long, short = _request(0, 5.0, tokens=450), [_request(number, 4.9, tokens=200) for number in (1, 2)]
    queue = _queue("goodput", long, *short, tokens_per_s=100)
    first = queue.first(0.0)
    assert first in short
    for request in short:
        queue.discard(request, 0.1)
    best_effort = _request(3)
    queue.push(best_effort, math.inf, 0.1)
    assert queue.first(0.2) is long


@pytest.mark.parametrize("order", ["edf", "goodput"])
def test_best_effort_requests_are_not_starved_by_due_times(order: QueueOrder) -> None:
    queue, now_s, number = _queue(order, _request(0)), 0.0, 1
    for _ in range(40):
        while len(queue) < 5:
            queue.push(_request(number, 1.0, received_s=now_s), math.inf, now_s)
            number += 1
        first = queue.first(now_s)
        assert first is not None
        queue.dispatch(first, now_s)
        if first.number == 0:
            break
        now_s += 0.5
    assert first.number == 0
    assert now_s >= 10.0, "not before it has waited for long"


@given(
    st.lists(
        st.tuples(
            st.integers(-1, 1), st.sampled_from((1.0, 5.0, math.inf)), st.sampled_from("ab"), st.integers(1, 500)
        ),
        max_size=30,
    ),
    st.sampled_from(["fcfs", "edf", "goodput"]),
    st.floats(0, 3),
)
def test_all_are_dispatched_once_and_higher_priorities_first(
    waiting: list[tuple[int, float, str, int]], order: QueueOrder, step_s: float
) -> None:
    requests = [
        _request(number, ttft_s, tokens=tokens, tenant=tenant, priority=priority)
        for number, (priority, ttft_s, tenant, tokens) in enumerate(waiting)
    ]
    queue = _queue(order, *requests)
    numbers = _numbers(queue, step_s=step_s)
    assert sorted(numbers) == list(range(len(requests)))
    priorities = [requests[number].slo.priority for number in numbers]
    assert priorities == sorted(priorities, reverse=True)
    assert (len(queue), queue.num_tokens) == (0, 0)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 2000), st.integers(0, 500)), min_size=20, max_size=60))
def test_waiting_tenants_are_served_about_equally(served: list[tuple[str, int, int]]) -> None:
    """VTC's bound: as long as both wait, their counters differ by a bound that does not grow with time."""
    queue = RequestQueue("goodput")
    requests = [
        _request(number, 1.0 + number % 3, tokens=tokens, tenant=tenant)
        for number, (tenant, tokens, _) in enumerate(served)
    ]
    for tenant in "ab":
        queue.ledger.open(tenant)
    for request in requests:
        queue.push(request, math.inf, 0.0)
    waiting = {tenant: sum(request.client == tenant for request in requests) for tenant in "ab"}
    while all(waiting.values()):
        assert abs(queue.ledger.given("a") - queue.ledger.given("b")) <= FAIR_TOKENS + 2000 + OUTPUT_WEIGHT * 500
        first = queue.first(0.0)
        assert first is not None
        queue.dispatch(first, 0.0)
        waiting[first.client] -= 1
        queue.ledger.generated(first.client, served[first.number][2])


def test_output_tokens_and_uncached_prompt_tokens_are_charged() -> None:
    queue = RequestQueue()
    queue.ledger.open("a")
    queue.ledger.dispatched("a", 100)
    queue.ledger.found_cached("a", 90)
    queue.ledger.generated("a", 7)
    assert queue.ledger.given("a") == 10 + 7 * OUTPUT_WEIGHT


def test_a_newcomer_with_a_near_deadline_waits_less() -> None:
    waiting = [_request(number, 9.0) for number in range(10)] + [_request(number) for number in range(10, 20)]
    queue = _queue("goodput", *waiting, tokens_per_s=100)
    assert queue.expected_wait_s(0.0, _request(50, 1.0)) == 0.0
    assert queue.expected_wait_s(0.0, _request(50, 20.0)) == pytest.approx(10.0, rel=0.2)
    assert queue.expected_wait_s(0.0, _request(50)) == pytest.approx(20.0, rel=0.2)
    assert queue.expected_wait_s(0.0, _request(50, priority=1)) == 0.0


def test_a_newcomer_is_left_out_if_it_would_take_the_time_of_more() -> None:
    waiting = [_request(number, 6.0) for number in range(5)]
    queue = _queue("goodput", *waiting, tokens_per_s=100)
    assert queue.leaves_out(_request(50, 6.0, tokens=300), 0.0)
    assert not queue.leaves_out(_request(50, 6.0, tokens=50), 0.0)
    assert not queue.leaves_out(_request(50, 60.0, tokens=300), 0.0)
