"""Requests that wait in the router until an instance has credit, and how long a new request would wait behind them.

The highest priority comes first. Of its requests, those that can still meet their TTFT target are dispatched in the
order of their due times, and then the others in the order of arrival (`scheduling.queue_order`). Both parts are fair
between tenants: with a due time within a bound, by arrival strictly.

    push -> [timely: by due time | others: by arrival] of its priority -> dispatch, or discard
                  ^-- goodput: `_plan` moves requests --^
"""

import math
from itertools import chain

from tandem.scheduling.drain_rate import DrainRate, FirstTokenTime
from tandem.scheduling.keyed_heap import KeyedHeap
from tandem.scheduling.queue_order import Job, QueueOrder, left_out
from tandem.scheduling.routed_request import RoutedRequest
from tandem.scheduling.tenant_ledger import TenantLedger

# Due times decide between tenants whose counters differ by at most this: twice the cost of a long request, which is
# VTC's own bound between two waiting tenants.
FAIR_TOKENS = 8192

# So that the others are not starved, one of this many dispatches is the first of them, if it has waited long enough.
_OTHERS_SHARE = 8
_PATIENT_TARGETS = 2  # long enough: this many times the TTFT target,
_PATIENT_S = 10.0  # or this without a target

# `_plan` runs after each arrival while few requests wait, and at most this often while many do: it takes 2 ms for a
# thousand requests.
_REPLAN_S = 0.05
_MANY = 64


class _FairQueue:
    """Requests of several tenants; within a tenant the lowest key is first. `fair_tokens`: see FAIR_TOKENS; with 0 the
    tenant with the lowest counter is next.

    `latest_due_s` and `longest_tokens` are upper bounds of the due times and prompts that wait: the maxima since the
    queue was empty. `num_due` counts the requests with a due time.
    """

    __slots__ = ("_fair_tokens", "latest_due_s", "longest_tokens", "num_due", "num_tokens", "tenants", "tokens_of")

    def __init__(self, fair_tokens: float) -> None:
        self._fair_tokens = fair_tokens
        self.latest_due_s = -math.inf
        self.longest_tokens = 0
        self.num_due = 0
        self.tenants: dict[str, KeyedHeap[RoutedRequest]] = {}
        self.tokens_of: dict[str, int] = {}
        self.num_tokens = 0

    def push(self, request: RoutedRequest, key: float) -> None:
        heap = self.tenants.get(request.client)
        if heap is None:
            heap = self.tenants[request.client] = KeyedHeap()
            self.tokens_of[request.client] = 0
        heap.push(request, key)
        self.tokens_of[request.client] += request.num_tokens
        self.num_tokens += request.num_tokens
        self.num_due += request.has_due_time
        self.latest_due_s = max(self.latest_due_s, request.due_s)
        self.longest_tokens = max(self.longest_tokens, request.num_tokens)

    def discard(self, request: RoutedRequest) -> bool:
        """Remove the request. False: it is not in this queue."""
        heap = self.tenants.get(request.client)
        if heap is None or request not in heap:
            return False
        heap.discard(request)
        self.num_tokens -= request.num_tokens
        self.num_due -= request.has_due_time
        self.tokens_of[request.client] -= request.num_tokens
        if not heap:
            del self.tenants[request.client], self.tokens_of[request.client]
        if not self.tenants:
            self.latest_due_s, self.longest_tokens = -math.inf, 0
        return True

    def first(self, ledger: TenantLedger) -> RoutedRequest | None:
        """The request with the lowest key, of the tenants whose counters allow it."""
        if not self.tenants:
            return None
        limit = min(map(ledger.given, self.tenants)) + self._fair_tokens
        heads = [heap.peek() for tenant, heap in self.tenants.items() if ledger.given(tenant) <= limit]
        return min((head for head in heads if head is not None), key=lambda head: (head[0], head[1].number))[1]

    @property
    def earliest_key(self) -> float:
        return min((head[0] for heap in self.tenants.values() if (head := heap.peek()) is not None), default=math.inf)

    def requests(self) -> list[RoutedRequest]:
        return [request for heap in self.tenants.values() for request in heap]

    def tokens_before(self, newcomer: RoutedRequest) -> int:
        """Prompt tokens that are dispatched before the newcomer, if every tenant gets the same share."""
        own_tokens = self.tokens_of.get(newcomer.client, 0)
        share = own_tokens + newcomer.num_tokens  # of each other tenant, until the newcomer is dispatched
        others = (tokens for tenant, tokens in self.tokens_of.items() if tenant != newcomer.client)
        return own_tokens + sum(min(tokens, share) for tokens in others)


class _PriorityLevel:
    """The requests of one priority."""

    __slots__ = ("others", "timely")

    def __init__(self) -> None:
        self.timely = _FairQueue(FAIR_TOKENS)
        self.others = _FairQueue(0)

    @property
    def is_empty(self) -> bool:
        return not self.timely.tenants and not self.others.tenants


class RequestQueue:
    """Owned by the routing machine. A request that returns after a failure gets the place of its first arrival."""

    def __init__(self, order: QueueOrder = "fcfs") -> None:
        self.num_tokens = 0  # of all waiting prompts
        self.ledger = TenantLedger()
        self.first_token_time = FirstTokenTime()
        self._order = order
        self._levels: dict[int, _PriorityLevel] = {}  # by priority; only non-empty levels
        self._waiting: dict[RoutedRequest, None] = {}
        self._patience: KeyedHeap[RoutedRequest] = KeyedHeap()  # by the time until which each request waits
        self._rate = DrainRate()
        self._num_since_others = 0  # dispatches since the last one of `others`
        self._planned_s = -math.inf  # time of the last `_plan`
        self._has_new = False  # requests have arrived since

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def next_end_s(self) -> float:
        """When the next request has waited for too long; inf: never."""
        found = self._patience.peek()
        return math.inf if found is None else found[0]

    def first(self, now_s: float) -> RoutedRequest | None:
        """The request to dispatch next."""
        if self._order == "goodput" and (
            now_s - self._planned_s >= _REPLAN_S or (self._has_new and len(self._waiting) <= _MANY)
        ):
            self._plan(now_s)
        if not self._levels:
            return None
        level = self._levels[max(self._levels)]
        other = level.others.first(self.ledger)
        if other is not None and self._num_since_others >= _OTHERS_SHARE - 1 and now_s >= _patient_until_s(other):
            return other
        return level.timely.first(self.ledger) or other

    def push(self, request: RoutedRequest, until_s: float, now_s: float) -> None:
        """The request waits, until `until_s` at most (inf: without limit)."""
        if not self._waiting:
            self._rate.begin(now_s)
        self.ledger.open(request.client)
        tenants = set(
            chain.from_iterable((*level.timely.tenants, *level.others.tenants) for level in self._levels.values())
        )
        if request.client not in tenants:
            self.ledger.wait(request.client, min(map(self.ledger.given, tenants), default=None))
        level = self._levels.setdefault(request.slo.priority, _PriorityLevel())
        if self._order != "fcfs" and request.has_due_time:
            level.timely.push(request, _timely_key(request))
        else:
            level.others.push(request, request.number)
        if until_s < math.inf:
            self._patience.push(request, until_s)
        self._waiting[request] = None
        self._has_new = True
        self.num_tokens += request.num_tokens

    def dispatch(self, request: RoutedRequest, now_s: float) -> None:
        """The request leaves the queue for an instance."""
        is_other = request in self._levels[request.slo.priority].others.tenants.get(request.client, ())
        self._num_since_others = 0 if is_other else self._num_since_others + 1
        self._rate.left(request.num_tokens, now_s)
        self.ledger.dispatched(request.client, request.num_tokens)
        self.discard(request, now_s)

    def discard(self, request: RoutedRequest, now_s: float) -> None:
        """Remove the request; no effect if it does not wait."""
        if request not in self._waiting:
            return
        del self._waiting[request]
        level = self._levels[request.slo.priority]
        is_found = level.timely.discard(request) or level.others.discard(request)
        assert is_found, "a waiting request is in a queue of its priority"
        if level.is_empty:
            del self._levels[request.slo.priority]
        self.ledger.close(request.client)
        self._patience.discard(request)
        self.num_tokens -= request.num_tokens
        if not self._waiting:
            self._rate.end(now_s)

    def pop_impatient(self, now_s: float) -> list[RoutedRequest]:
        """Remove and return the requests that have waited for too long."""
        taken = []
        while (found := self._patience.peek()) is not None and found[0] <= now_s:
            self.discard(found[1], now_s)
            taken.append(found[1])
        return taken

    # --- predictions -------------------------------------------------------------------------------------------------

    def expected_wait_s(self, now_s: float, newcomer: RoutedRequest | None = None) -> float:
        """How long a newcomer would wait, at the recent rate; `newcomer` None: behind all others. 0 if the queue is
        empty or no rate is measured yet."""
        rate = self._rate.tokens_per_s(now_s) if self._waiting else None
        if rate is None:
            return 0.0
        return (self.num_tokens if newcomer is None else self._tokens_before(newcomer)) / rate

    def leaves_out(self, newcomer: RoutedRequest, now_s: float) -> bool:
        """Whether a newcomer with a TTFT target would be among the requests that cannot be on time. Only the order
        "goodput" leaves requests out; with other orders `expected_wait_s` decides alone."""
        if self._order != "goodput" or not self._waiting:
            return False
        start_s, token_s = now_s, self._token_s(now_s)
        for priority, level in self._levels.items():
            if priority > newcomer.slo.priority:
                start_s += level.timely.num_tokens * token_s
        level = self._levels.get(newcomer.slo.priority, _PriorityLevel())
        if self._all_in_time(level.timely, start_s, token_s, newcomer):
            return False
        rivals = [request for request in level.timely.requests() if not request.num_output_tokens]
        jobs = [self._job(request, token_s) for request in (*rivals, newcomer)]
        return len(rivals) in left_out(jobs, start_s)

    def _tokens_before(self, newcomer: RoutedRequest) -> int:
        tokens = 0
        for priority, level in self._levels.items():
            if priority > newcomer.slo.priority:
                tokens += level.timely.num_tokens + level.others.num_tokens
            elif priority == newcomer.slo.priority:
                if self._order != "fcfs" and newcomer.has_due_time:
                    if newcomer.due_s >= level.timely.latest_due_s:
                        tokens += level.timely.num_tokens
                        continue
                    timely = level.timely.requests()
                    tokens += sum(request.num_tokens for request in timely if request.due_s <= newcomer.due_s)
                else:
                    tokens += level.timely.num_tokens + level.others.tokens_before(newcomer)
        return tokens

    # --- which requests can be on time -------------------------------------------------------------------------------

    def _plan(self, now_s: float) -> None:
        """Move requests that cannot be on time to `others`, and requests that can be again to `timely`."""
        self._planned_s, self._has_new = now_s, False
        start_s, token_s = now_s, self._token_s(now_s)
        for _, level in sorted(self._levels.items(), reverse=True):
            if not level.others.num_due and self._all_in_time(level.timely, start_s, token_s):
                start_s += level.timely.num_tokens * token_s
                continue
            waiting = [request for request in level.timely.requests() if not request.num_output_tokens]
            num_timely = len(waiting)
            waiting += [request for request in level.others.requests() if request.has_due_time]
            if not waiting:
                continue
            late = left_out([self._job(request, token_s) for request in waiting], start_s)
            for index, request in enumerate(waiting):
                was_timely, is_timely = index < num_timely, index not in late
                if was_timely and not is_timely:
                    level.timely.discard(request)
                    level.others.push(request, request.number)
                elif is_timely and not was_timely:
                    level.others.discard(request)
                    level.timely.push(request, request.due_s)
            start_s += level.timely.num_tokens * token_s

    def _all_in_time(
        self, timely: _FairQueue, start_s: float, token_s: float, newcomer: RoutedRequest | None = None
    ) -> bool:
        """True if even the earliest due time leaves time for all of them. False says nothing: the check is O(tenants),
        and the exact answer needs `left_out`."""
        due_s, longest, tokens = timely.earliest_key, timely.longest_tokens, timely.num_tokens
        if newcomer is not None:
            due_s, longest = min(due_s, newcomer.due_s), max(longest, newcomer.num_tokens)
            tokens += newcomer.num_tokens
        return start_s + tokens * token_s <= due_s - self.first_token_time.expected_s(longest)

    def _job(self, request: RoutedRequest, token_s: float) -> Job:
        """Due when just enough time is left to compute the first token."""
        due_s = request.due_s - self.first_token_time.expected_s(request.num_tokens)
        return Job(due_s, request.num_tokens * token_s, request.slo.weight)

    def _token_s(self, now_s: float) -> float:
        """Seconds in which one prompt token leaves the queue; 0 while no rate is measured."""
        rate = self._rate.tokens_per_s(now_s)
        return 0.0 if rate is None else 1 / rate


def _timely_key(request: RoutedRequest) -> float:
    """Requests that have sent tokens to their client come first."""
    return -math.inf if request.num_output_tokens else request.due_s


def _patient_until_s(request: RoutedRequest) -> float:
    ttft_s = request.slo.ttft_s
    return request.received_s + (_PATIENT_TARGETS * ttft_s if ttft_s < math.inf else _PATIENT_S)
