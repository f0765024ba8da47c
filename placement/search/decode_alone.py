"""Decode alone, as DistServe's Algorithm 1 has it: prefill is taken to be infinitely fast.

A quick model of `scheduling.decode` under a router that picks the instance with the fewest sequences: continuous
batching, admission while memory has room for the whole sequence. Between an arrival and an end the batch stays the
same, and a run of k steps has a closed form since a step's time is affine in the KV it reads, so that a request costs
two events however many tokens it has.
"""

import heapq
import math
from collections import deque

from tandem.placement.search.kinds import InstanceKind
from tandem.placement.workload.requests import Floats


def decode_time_alone(
    kind: InstanceKind, ready_s: Floats, prompt_tokens: list[int], output_tokens: list[int], *, instances: int
) -> Floats:
    """Seconds from the first token, which is there at `ready_s` (ascending), to the last one, of each request."""
    finished_s = ready_s.copy()
    lines: dict[int, tuple[float, float]] = {}
    fleet = [_Instance(kind, lines, finished_s) for _ in range(instances)]
    for request, now_s in enumerate(ready_s.tolist()):
        if output_tokens[request] < 2:
            continue
        for instance in fleet:
            instance.advance(now_s)
        least = min(fleet, key=len)
        least.add(request, now_s, prompt_tokens[request], output_tokens[request])
    for instance in fleet:
        instance.advance(math.inf)
    return finished_s - ready_s


class _Instance:
    """One continuous batch. `_now_s` is the end of its last step."""

    __slots__ = (
        "_claimed",
        "_ending",
        "_finished_s",
        "_kind",
        "_kv",
        "_lines",
        "_now_s",
        "_steps",
        "_waiting",
    )

    def __init__(self, kind: InstanceKind, lines: dict[int, tuple[float, float]], finished_s: Floats) -> None:
        self._kind = kind
        self._lines = lines  # batch -> decode_coefficients, shared by equal instances
        self._finished_s = finished_s
        self._now_s = 0.0
        self._steps = 0
        self._kv = 0  # tokens the next step reads
        self._claimed = 0
        self._ending: list[tuple[int, int, int]] = []  # (number of the last step, request, tokens at its end)
        self._waiting: deque[tuple[int, int, int]] = deque()

    def __len__(self) -> int:
        return len(self._ending) + len(self._waiting)

    def add(self, request: int, now_s: float, prompt_tokens: int, output_tokens: int) -> None:
        if not self._ending:
            self._now_s = max(self._now_s, now_s)
        self._waiting.append((request, prompt_tokens, output_tokens))
        self._admit()

    def advance(self, until_s: float) -> None:
        """Run steps until the first that ends at `until_s` or later."""
        while self._ending and self._now_s < until_s:
            batch = len(self._ending)
            if batch not in self._lines:
                self._lines[batch] = self._kind.cost.decode_coefficients(batch)
            base_s, per_token_s = self._lines[batch]
            first_s = base_s + per_token_s * self._kv
            growth_s = per_token_s * batch  # by which each step takes longer than the one before
            to_end = self._ending[0][0] - self._steps
            count = int(min(to_end, steps_until(until_s - self._now_s, first_s, growth_s)))
            self._now_s += count * first_s + growth_s * (count * (count - 1) / 2)
            self._steps += count
            self._kv += count * batch
            if count == to_end:
                self._finish()
                self._admit()

    def _finish(self) -> None:
        while self._ending and self._ending[0][0] == self._steps:
            _, request, tokens = heapq.heappop(self._ending)
            self._finished_s[request] = self._now_s
            self._kv -= tokens
            self._claimed -= tokens

    def _admit(self) -> None:
        while self._waiting and len(self._ending) < self._kind.max_batch:
            request, prompt_tokens, output_tokens = self._waiting[0]
            # The last token drawn is never read: the sequence ends with prompt + output - 1 tokens of KV, and the step
            # after that one would have read one more.
            tokens = prompt_tokens + output_tokens
            if self._ending and self._claimed + tokens > self._kind.kv_tokens:
                return
            self._waiting.popleft()
            heapq.heappush(self._ending, (self._steps + output_tokens - 1, request, tokens))
            self._kv += prompt_tokens + 1
            self._claimed += tokens


def steps_until(time_s: float, first_s: float, growth_s: float) -> int | float:
    """The least number of steps, at least 1, that together take `time_s`, of which step k takes first + k * growth."""
    if time_s == math.inf:
        return math.inf
    if growth_s <= 0:
        return max(1, math.ceil(time_s / first_s))
    b = first_s - growth_s / 2
    return max(1, math.ceil((math.sqrt(b * b + 2 * growth_s * time_s) - b) / growth_s))
