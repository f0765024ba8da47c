"""Requests that wait in the router until an instance has credit, and how long a newcomer would wait behind them."""

import math

from tandem.scheduling.keyed_heap import KeyedHeap
from tandem.scheduling.routed_request import RoutedRequest

RATE_MEMORY_S = 10.0  # of waiting; what was measured longer ago hardly counts


class DrainRate:
    """Prompt tokens that leave the queue per second while something waits. Older measurements fade exponentially.

    Time without anybody waiting does not count: it says nothing of what the instances can do.
    """

    __slots__ = ("_busy_s", "_since_s", "_tokens")

    def __init__(self) -> None:
        self._tokens = 0.0
        self._busy_s = 0.0
        self._since_s: float | None = None  # None: nobody waits

    def begin(self, now_s: float) -> None:
        """Somebody waits from now on."""
        self._since_s = now_s

    def end(self, now_s: float) -> None:
        """Nobody waits any more."""
        self._pass_time(now_s)
        self._since_s = None

    def left(self, num_tokens: int, now_s: float) -> None:
        """A prompt of that length has left the queue for an instance."""
        self._pass_time(now_s)
        self._tokens += num_tokens

    def tokens_per_s(self, now_s: float) -> float | None:
        """None: not measured for long enough, or nothing has left."""
        self._pass_time(now_s)
        return self._tokens / self._busy_s if self._busy_s >= 1.0 and self._tokens else None

    def _pass_time(self, now_s: float) -> None:
        if self._since_s is None:
            return
        passed_s = now_s - self._since_s
        fade = math.exp(-passed_s / RATE_MEMORY_S)
        self._tokens *= fade
        self._busy_s = self._busy_s * fade + RATE_MEMORY_S * (1 - fade)
        self._since_s = now_s


class _ClientQueue:
    """What waits of one client."""

    __slots__ = ("num_tokens", "order")

    def __init__(self) -> None:
        self.num_tokens = 0
        self.order: KeyedHeap[RoutedRequest] = KeyedHeap()  # by arrival


class RequestQueue:
    """Fair between clients, first come first served for each of them. A request that comes back after a failure has its
    old place among those of its client.

    The next request is one of the client that has been given the fewest prompt tokens. A client that comes counts as
    given what the client served last had been given, so it neither waits for others to end nor makes up for its absence
    (the virtual token counter of Sheng et al., OSDI 2024, with prompt tokens as the cost).
    """

    def __init__(self) -> None:
        self.num_tokens = 0  # of the prompts that wait
        self._clients: dict[str, _ClientQueue] = {}  # those with requests that wait
        self._given_tokens: KeyedHeap[str] = KeyedHeap()  # of these clients
        self._last_given_tokens = 0.0  # of the client served last, before it was served
        self._patience: KeyedHeap[RoutedRequest] = KeyedHeap()  # until when each of them waits
        self._num_requests = 0
        self._rate = DrainRate()

    def __len__(self) -> int:
        return self._num_requests

    @property
    def first(self) -> RoutedRequest | None:
        client = self._given_tokens.peek()
        if client is None:
            return None
        found = self._clients[client[1]].order.peek()
        return None if found is None else found[1]

    @property
    def next_end_s(self) -> float:
        """When the first of them has waited for too long."""
        found = self._patience.peek()
        return math.inf if found is None else found[0]

    def push(self, request: RoutedRequest, until_s: float, now_s: float) -> None:
        """It waits, at most until then (inf: for as long as it takes)."""
        if not self._num_requests:
            self._rate.begin(now_s)
        queue = self._clients.get(request.client)
        if queue is None:
            queue = self._clients[request.client] = _ClientQueue()
            self._given_tokens.push(request.client, self._last_given_tokens)
        queue.order.push(request, request.number)
        queue.num_tokens += request.num_tokens
        if until_s < math.inf:
            self._patience.push(request, until_s)
        self._num_requests += 1
        self.num_tokens += request.num_tokens

    def dispatch(self, request: RoutedRequest, now_s: float) -> None:
        """An instance takes the first one."""
        given = self._given_tokens.peek()
        assert given is not None, "it waits"
        self._last_given_tokens, client = given
        assert client == request.client, "only the first one is dispatched"
        self._given_tokens.push(client, self._last_given_tokens + request.num_tokens)
        self._rate.left(request.num_tokens, now_s)
        self.discard(request, now_s)

    def discard(self, request: RoutedRequest, now_s: float) -> None:
        """It waits no longer; one that does not wait is ignored."""
        queue = self._clients.get(request.client)
        if queue is None or request not in queue.order:
            return
        queue.order.discard(request)
        queue.num_tokens -= request.num_tokens
        if not queue.order:
            del self._clients[request.client]
            self._given_tokens.discard(request.client)
        self._patience.discard(request)
        self._num_requests -= 1
        self.num_tokens -= request.num_tokens
        if not self._num_requests:
            self._rate.end(now_s)

    def pop_impatient(self, now_s: float) -> list[RoutedRequest]:
        """Take out those that have waited for too long."""
        taken = []
        while (found := self._patience.peek()) is not None and found[0] <= now_s:
            self.discard(found[1], now_s)
            taken.append(found[1])
        return taken

    def expected_wait_s(self, now_s: float, client: str | None = None, num_tokens: int = 0) -> float:
        """Of a newcomer, at the recent rate; 0 if nobody waits or nothing is measured yet. `num_tokens`: of its
        prompt. `client` None: behind all that wait."""
        rate = self._rate.tokens_per_s(now_s) if self._num_requests else None
        if rate is None:
            return 0.0
        if client is None:
            return self.num_tokens / rate
        own = self._clients.get(client)
        own_tokens = 0 if own is None else own.num_tokens
        share = own_tokens + num_tokens  # what each other client is given meanwhile
        others = (queue.num_tokens for queue in self._clients.values() if queue is not own)
        return (own_tokens + sum(min(tokens, share) for tokens in others)) / rate
