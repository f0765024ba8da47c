"""Requests that wait in the router until an instance has credit, and how long a newcomer would wait behind them.

Of the requests of the highest priority, those that can still meet their TTFT target are dispatched by deadline, and the
others behind them as they came (`scheduling.queue_order`). Both queues are fair between tenants: by deadline within a
bound, as they came without one.

    push -> [timely: by deadline | others: by arrival] of its priority -> dispatch, or discard
                  ^------ goodput: who can be in time ------^
"""

import math
from itertools import chain

from tandem.scheduling.drain_rate import DrainRate, FirstTokenTime
from tandem.scheduling.keyed_heap import KeyedHeap
from tandem.scheduling.queue_order import Job, QueueOrder, left_out
from tandem.scheduling.routed_request import RoutedRequest
from tandem.scheduling.tenant_ledger import TenantLedger

# Deadlines count among tenants whose counters differ by no more than this: twice the cost of a long request, as VTC's
# own bound between two tenants that wait.
FAIR_TOKENS = 8192

# Nobody starves: of this many dispatches, one goes to the first of the others, if it has waited for long enough.
_OTHERS_SHARE = 8
_PATIENT_TARGETS = 2  # times its TTFT target
_PATIENT_S = 10.0  # without a target

# Who can be in time is worked out after each arrival, but not more often than this where many wait: it takes 2 ms for a
# thousand.
_REPLAN_S = 0.05
_MANY = 64


class _FairQueue:
    """Requests of several tenants, each tenant's by a key. `fair_tokens`: see FAIR_TOKENS; 0: the tenant that was given
    least is next. `latest_due_s` and `longest_tokens` are the latest due time and the longest prompt since the queue
    was empty, so none that waits has more; `num_due` are meant to be in time."""

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
        """False: it is not in this queue."""
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
        """Those that come before it, since each tenant gets the same."""
        own_tokens = self.tokens_of.get(newcomer.client, 0)
        share = own_tokens + newcomer.num_tokens  # what each other tenant is given meanwhile
        others = (tokens for tenant, tokens in self.tokens_of.items() if tenant != newcomer.client)
        return own_tokens + sum(min(tokens, share) for tokens in others)


class _PriorityLevel:
    """What waits with one priority."""

    __slots__ = ("others", "timely")

    def __init__(self) -> None:
        self.timely = _FairQueue(FAIR_TOKENS)
        self.others = _FairQueue(0)

    @property
    def is_empty(self) -> bool:
        return not self.timely.tenants and not self.others.tenants


class RequestQueue:
    """Owned by the routing machine. A request that comes back after a failure has its old place."""

    def __init__(self, order: QueueOrder = "fcfs") -> None:
        self.num_tokens = 0  # of the prompts that wait
        self.ledger = TenantLedger()
        self.first_token_time = FirstTokenTime()
        self._order = order
        self._levels: dict[int, _PriorityLevel] = {}  # by priority, those that are not empty
        self._waiting: dict[RoutedRequest, None] = {}
        self._patience: KeyedHeap[RoutedRequest] = KeyedHeap()  # until when each of them waits
        self._rate = DrainRate()
        self._num_since_others = 0  # dispatches, since one of the others had its turn
        self._planned_s = -math.inf  # when it was worked out who can be in time
        self._has_news = False  # a request has come since

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def next_end_s(self) -> float:
        """When the first of them has waited for too long."""
        found = self._patience.peek()
        return math.inf if found is None else found[0]

    def first(self, now_s: float) -> RoutedRequest | None:
        """The next one to dispatch."""
        if self._order == "goodput" and (
            now_s - self._planned_s >= _REPLAN_S or (self._has_news and len(self._waiting) <= _MANY)
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
        """It waits, at most until then (inf: for as long as it takes)."""
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
        self._has_news = True
        self.num_tokens += request.num_tokens

    def dispatch(self, request: RoutedRequest, now_s: float) -> None:
        """An instance takes this one."""
        is_other = request in self._levels[request.slo.priority].others.tenants.get(request.client, ())
        self._num_since_others = 0 if is_other else self._num_since_others + 1
        self._rate.left(request.num_tokens, now_s)
        self.ledger.dispatched(request.client, request.num_tokens)
        self.discard(request, now_s)

    def discard(self, request: RoutedRequest, now_s: float) -> None:
        """It waits no longer; one that does not wait is ignored."""
        if request not in self._waiting:
            return
        del self._waiting[request]
        level = self._levels[request.slo.priority]
        assert level.timely.discard(request) or level.others.discard(request), "what waits is in a queue"
        if level.is_empty:
            del self._levels[request.slo.priority]
        self.ledger.close(request.client)
        self._patience.discard(request)
        self.num_tokens -= request.num_tokens
        if not self._waiting:
            self._rate.end(now_s)

    def pop_impatient(self, now_s: float) -> list[RoutedRequest]:
        """Take out those that have waited for too long."""
        taken = []
        while (found := self._patience.peek()) is not None and found[0] <= now_s:
            self.discard(found[1], now_s)
            taken.append(found[1])
        return taken

    # --- predictions -------------------------------------------------------------------------------------------------

    def expected_wait_s(self, now_s: float, newcomer: RoutedRequest | None = None) -> float:
        """Of a newcomer, at the recent rate; 0 if nobody waits or nothing is measured yet. None: behind all."""
        rate = self._rate.tokens_per_s(now_s) if self._waiting else None
        if rate is None:
            return 0.0
        return (self.num_tokens if newcomer is None else self._tokens_before(newcomer)) / rate

    def leaves_out(self, newcomer: RoutedRequest, now_s: float) -> bool:
        """Whether a newcomer with a TTFT target would be too late, or would make others late that need less time. Only
        where they are left out; with the other orders its `expected_wait_s` says it all."""
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

    # --- who can be in time ------------------------------------------------------------------------------------------

    def _plan(self, now_s: float) -> None:
        """Move those that cannot be in time behind the others, and those that now can back."""
        self._planned_s, self._has_news = now_s, False
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
        """Whether even the earliest due time leaves time for all of them, at no cost that grows with their number. Of a
        False nothing follows."""
        due_s, longest, tokens = timely.earliest_key, timely.longest_tokens, timely.num_tokens
        if newcomer is not None:
            due_s, longest = min(due_s, newcomer.due_s), max(longest, newcomer.num_tokens)
            tokens += newcomer.num_tokens
        return start_s + tokens * token_s <= due_s - self.first_token_time.expected_s(longest)

    def _job(self, request: RoutedRequest, token_s: float) -> Job:
        """It should have left the queue when there is just time enough to compute its first token."""
        due_s = request.due_s - self.first_token_time.expected_s(request.num_tokens)
        return Job(due_s, request.num_tokens * token_s, request.slo.weight)

    def _token_s(self, now_s: float) -> float:
        """Time that the queue takes for a token; 0 while nothing is measured: then only what is late is late."""
        rate = self._rate.tokens_per_s(now_s)
        return 0.0 if rate is None else 1 / rate


def _timely_key(request: RoutedRequest) -> float:
    """One that has tokens already goes first: its client was promised the rest."""
    return -math.inf if request.num_output_tokens else request.due_s


def _patient_until_s(request: RoutedRequest) -> float:
    ttft_s = request.slo.ttft_s
    return request.received_s + (_PATIENT_TARGETS * ttft_s if ttft_s < math.inf else _PATIENT_S)
