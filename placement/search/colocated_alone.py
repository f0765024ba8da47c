"""A colocated instance, both phases on the same devices: the alternative that disaggregation has to beat.

A quick model of `scheduling.colocated` under a router that picks the instance with the fewest sequences. Steps with
prompt tokens in them are walked through one by one, runs of decoding alone have a closed form (see `decode_alone`).
"""

import heapq
import math
from collections import deque

import numpy as np

from tandem.core.cost_model import CostModel, StepLoad, attention_pairs
from tandem.placement.search.decode_alone import steps_until
from tandem.placement.search.kinds import InstanceKind
from tandem.placement.workload.requests import Floats


def latencies_colocated(
    kind: InstanceKind, arrival_s: Floats, prompt_tokens: list[int], output_tokens: list[int], *, instances: int
) -> tuple[Floats, Floats]:
    """Seconds from arrival to the first token, and from there to the last one, of each request."""
    first_token_s = np.zeros(len(arrival_s))
    finished_s = np.zeros(len(arrival_s))
    lines: dict[int, tuple[float, float]] = {}
    fleet = [_Instance(kind, lines, prompt_tokens, output_tokens, first_token_s, finished_s) for _ in range(instances)]
    for request, now_s in enumerate(arrival_s.tolist()):
        for instance in fleet:
            instance.advance(now_s)
        min(fleet, key=len).add(request, now_s)
    for instance in fleet:
        instance.advance(math.inf)
    return first_token_s - arrival_s, finished_s - first_token_s


class _Instance:
    """`_now_s` is the end of its last step."""

    __slots__ = (
        "_claimed",
        "_cost",
        "_ending",
        "_finished_s",
        "_first_token_s",
        "_kind",
        "_kv",
        "_lines",
        "_now_s",
        "_output_tokens",
        "_prompt_tokens",
        "_prompts",
        "_steps",
        "_waiting",
    )

    def __init__(
        self,
        kind: InstanceKind,
        lines: dict[int, tuple[float, float]],
        prompt_tokens: list[int],
        output_tokens: list[int],
        first_token_s: Floats,
        finished_s: Floats,
    ) -> None:
        self._kind = kind
        self._cost: CostModel = kind.cost
        self._lines = lines  # batch -> decode_coefficients, shared by equal instances
        self._prompt_tokens = prompt_tokens
        self._output_tokens = output_tokens
        self._first_token_s = first_token_s
        self._finished_s = finished_s
        self._now_s = 0.0
        self._steps = 0  # in which decoding advanced
        self._kv = 0  # tokens that the next decoding step reads
        self._claimed = 0  # tokens of admitted requests once they have ended
        self._waiting: deque[int] = deque()
        self._prompts: deque[list[int]] = deque()  # admitted: request, tokens computed
        self._ending: list[tuple[int, int]] = []  # decoding: (number of the last step, request)

    def __len__(self) -> int:
        return len(self._waiting) + len(self._prompts) + len(self._ending)

    def add(self, request: int, now_s: float) -> None:
        if len(self) == 0:
            self._now_s = max(self._now_s, now_s)
        self._waiting.append(request)
        self._admit()

    def advance(self, until_s: float) -> None:
        """Run steps until the first that ends at `until_s` or later."""
        while self._now_s < until_s and (self._prompts or self._ending):
            if self._prompts:
                self._mixed_step()
            else:
                self._decode(until_s)
            self._end()
            self._admit()

    def _mixed_step(self) -> None:
        """Prompts' chunks beside the decoding tokens; prompt-first has whole prompts, and decoding stands still."""
        chunked = self._kind.policy == "chunked"
        decoding = len(self._ending) if chunked else 0
        budget = self._kind.max_batch_tokens - decoding
        tokens = attended = kv_tokens = count = 0
        drawn: list[int] = []
        while self._prompts and budget > 0:
            request, start = self._prompts[0]
            length = self._prompt_tokens[request] - start
            if not chunked and length > budget and tokens:
                break
            part = min(length, budget) if chunked else length
            tokens += part
            attended += attention_pairs(start, part)
            kv_tokens += start + part
            count += 1
            budget -= part
            if part < length:
                self._prompts[0][1] += part
                break
            self._prompts.popleft()
            drawn.append(request)
        load = StepLoad(
            tokens, count, attended, kv_tokens, decoding, self._kv if decoding else 0, decoding + len(drawn)
        )
        self._now_s += self._cost.step(load).interval_s
        if decoding:
            self._steps += 1
            self._kv += decoding
        for request in drawn:
            self._first_token_s[request] = self._now_s
            heapq.heappush(self._ending, (self._steps + self._output_tokens[request] - 1, request))
            self._kv += self._prompt_tokens[request] + 1

    def _decode(self, until_s: float) -> None:
        batch = len(self._ending)
        if batch not in self._lines:
            self._lines[batch] = self._cost.decode_coefficients(batch)
        base_s, per_token_s = self._lines[batch]
        first_s, growth_s = base_s + per_token_s * self._kv, per_token_s * batch
        count = int(min(self._ending[0][0] - self._steps, steps_until(until_s - self._now_s, first_s, growth_s)))
        self._now_s += count * first_s + growth_s * (count * (count - 1) / 2)
        self._steps += count
        self._kv += count * batch

    def _end(self) -> None:
        while self._ending and self._ending[0][0] <= self._steps:
            _, request = heapq.heappop(self._ending)
            self._finished_s[request] = self._now_s
            tokens = self._prompt_tokens[request] + self._output_tokens[request]
            self._kv -= tokens
            self._claimed -= tokens

    def _admit(self) -> None:
        while self._waiting and len(self._prompts) + len(self._ending) < self._kind.max_batch:
            request = self._waiting[0]
            tokens = self._prompt_tokens[request] + self._output_tokens[request]
            if self._claimed and self._claimed + tokens > self._kind.kv_tokens:
                return
            self._waiting.popleft()
            self._prompts.append([request, 0])
            self._claimed += tokens
