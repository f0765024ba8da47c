"""A fast model of the decode phase with infinitely fast prefill, as in DistServe's Algorithm 1.

The router picks the instance with the fewest sequences. An instance has continuous batching and admits a sequence if
its final KV fits. The batch is constant between an admission and a finish, and step time is affine in KV tokens, so
the time of k steps has a closed form: a request costs two events for any number of tokens. This approximates
`scheduling.scheduler`.
"""

import heapq
import math
from collections import deque

from tandem.placement.search.kinds import InstanceKind
from tandem.placement.workload.requests import Floats


def decode_time_s(
    kind: InstanceKind, ready_s: Floats, prompt_tokens: list[int], output_tokens: list[int], *, instances: int
) -> Floats:
    """Seconds from the first token, at `ready_s` (ascending), to the last token of each request."""
    finished_s = ready_s.copy()
    coefficients: dict[int, tuple[float, float]] = {}
    group = [_DecodeInstance(kind, coefficients, finished_s) for _ in range(instances)]
    for request, now_s in enumerate(ready_s.tolist()):
        if output_tokens[request] < 2:
            continue
        for instance in group:
            instance.advance(now_s)
        min(group, key=len).add(request, now_s, prompt_tokens[request], output_tokens[request])
    for instance in group:
        instance.advance(math.inf)
    return finished_s - ready_s


class _DecodeInstance:
    """One continuous batch. `_now_s` is the end of the last step."""

    __slots__ = (
        "_coefficients",
        "_finished_s",
        "_kind",
        "_kv_tokens",
        "_now_s",
        "_reserved_tokens",
        "_running",
        "_steps",
        "_waiting",
    )

    def __init__(self, kind: InstanceKind, coefficients: dict[int, tuple[float, float]], finished_s: Floats) -> None:
        self._kind = kind
        self._coefficients = coefficients  # batch -> decode_coefficients, shared by equal instances
        self._finished_s = finished_s
        self._now_s = 0.0
        self._steps = 0
        self._kv_tokens = 0  # read by the next step
        self._reserved_tokens = 0  # final tokens of the admitted sequences
        self._running: list[tuple[int, int, int]] = []  # (number of the last step, request, final tokens)
        self._waiting: deque[tuple[int, int, int]] = deque()

    def __len__(self) -> int:
        return len(self._running) + len(self._waiting)

    def add(self, request: int, now_s: float, prompt_tokens: int, output_tokens: int) -> None:
        if not self._running:
            self._now_s = max(self._now_s, now_s)
        self._waiting.append((request, prompt_tokens, output_tokens))
        self._admit()

    def advance(self, until_s: float) -> None:
        """Run steps until the first step that ends at `until_s` or later."""
        while self._running and self._now_s < until_s:
            batch = len(self._running)
            if batch not in self._coefficients:
                self._coefficients[batch] = self._kind.cost.decode_coefficients(batch)
            base_s, per_token_s = self._coefficients[batch]
            first_s = base_s + per_token_s * self._kv_tokens
            growth_s = per_token_s * batch  # each step takes this much longer than the step before it
            to_end = self._running[0][0] - self._steps
            count = int(min(to_end, steps_until(until_s - self._now_s, first_s, growth_s)))
            self._now_s += count * first_s + growth_s * (count * (count - 1) / 2)
            self._steps += count
            self._kv_tokens += count * batch
            if count == to_end:
                self._finish()
                self._admit()

    def _finish(self) -> None:
        while self._running and self._running[0][0] == self._steps:
            _, request, tokens = heapq.heappop(self._running)
            self._finished_s[request] = self._now_s
            self._kv_tokens -= tokens
            self._reserved_tokens -= tokens

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._kind.max_batch:
            request, prompt_tokens, output_tokens = self._waiting[0]
            # The last sampled token is never read: a sequence ends with prompt + output - 1 KV tokens. `_kv_tokens` is
            # the count for the next step, which is one more.
            tokens = prompt_tokens + output_tokens
            if self._running and self._reserved_tokens + tokens > self._kind.kv_tokens:
                return
            self._waiting.popleft()
            heapq.heappush(self._running, (self._steps + output_tokens - 1, request, tokens))
            self._kv_tokens += prompt_tokens + 1
            self._reserved_tokens += tokens


def steps_until(time_s: float, first_s: float, growth_s: float) -> int | float:
    """The smallest number of steps, at least 1, with a total time of at least `time_s`. Step k takes first_s + k *
    growth_s."""
    if time_s == math.inf:
        return math.inf
    if growth_s <= 0:
        return max(1, math.ceil(time_s / first_s))
    b = first_s - growth_s / 2
    return max(1, math.ceil((math.sqrt(b * b + 2 * growth_s * time_s) - b) / growth_s))
