"""A fast model of colocated instances, which serve both phases on the same devices.

The router picks the instance with the fewest sequences. Decode steps have a closed form, as in `decode_model`. So have
the steps of a long prompt's full chunks beside a constant batch: their times grow by nearly equal amounts, so the first
and the last of them determine the others. Other steps with prompt tokens are computed one by one. This approximates
`scheduling.scheduler` on a colocated instance.
"""

import heapq
import math
from collections import deque

import numpy as np

from tandem.core.cost_model import CostModel, StepLoad, attention_pairs
from tandem.placement.search.decode_model import steps_until
from tandem.placement.search.kinds import InstanceKind
from tandem.placement.workload.requests import Floats

_MIN_FULL_CHUNKS = 3  # of fewer steps each is computed


def colocated_latencies_s(
    kind: InstanceKind, arrival_s: Floats, prompt_tokens: list[int], output_tokens: list[int], *, instances: int
) -> tuple[Floats, Floats]:
    """(arrival to first token, first token to last token) of each request, in seconds."""
    first_token_s = np.zeros(len(arrival_s))
    finished_s = np.zeros(len(arrival_s))
    coefficients: dict[int, tuple[float, float]] = {}
    group = [
        _ColocatedInstance(kind, coefficients, prompt_tokens, output_tokens, first_token_s, finished_s)
        for _ in range(instances)
    ]
    for request, now_s in enumerate(arrival_s.tolist()):
        for instance in group:
            instance.advance(now_s)
        min(group, key=len).add(request, now_s)
    for instance in group:
        instance.advance(math.inf)
    return first_token_s - arrival_s, finished_s - first_token_s


class _ColocatedInstance:
    """`_now_s` is the end of the last step."""

    __slots__ = (
        "_coefficients",
        "_cost",
        "_finished_s",
        "_first_token_s",
        "_kind",
        "_kv_tokens",
        "_now_s",
        "_output_tokens",
        "_prompt_tokens",
        "_prompts",
        "_reserved_tokens",
        "_running",
        "_steps",
        "_waiting",
    )

    def __init__(
        self,
        kind: InstanceKind,
        coefficients: dict[int, tuple[float, float]],
        prompt_tokens: list[int],
        output_tokens: list[int],
        first_token_s: Floats,
        finished_s: Floats,
    ) -> None:
        self._kind = kind
        self._cost: CostModel = kind.cost
        self._coefficients = coefficients  # batch -> decode_coefficients, shared by equal instances
        self._prompt_tokens = prompt_tokens
        self._output_tokens = output_tokens
        self._first_token_s = first_token_s
        self._finished_s = finished_s
        self._now_s = 0.0
        self._steps = 0  # with decoding
        self._kv_tokens = 0  # read by the next decode step
        self._reserved_tokens = 0  # final tokens of the admitted requests
        self._waiting: deque[int] = deque()
        self._prompts: deque[list[int]] = deque()  # admitted: [request, computed tokens]
        self._running: list[tuple[int, int]] = []  # decoding: (number of the last step, request)

    def __len__(self) -> int:
        return len(self._waiting) + len(self._prompts) + len(self._running)

    def add(self, request: int, now_s: float) -> None:
        if len(self) == 0:
            self._now_s = max(self._now_s, now_s)
        self._waiting.append(request)
        self._admit()

    def advance(self, until_s: float) -> None:
        """Run steps until the first step that ends at `until_s` or later."""
        while self._now_s < until_s and (self._prompts or self._running):
            if not self._prompts:
                self._decode(until_s)
            elif not self._full_chunks(until_s):
                self._mixed_step()
            self._finish()
            self._admit()

    def _mixed_step(self) -> None:
        """A step with prompt chunks and decoding tokens; with the policy prompt_first, complete prompts and no
        decode. With slack as chunked: what its chunks gain is not predicted."""
        chunked = self._kind.policy != "prompt_first"
        decoding = len(self._running) if chunked else 0
        budget = self._kind.max_batch_tokens - decoding
        tokens = pairs = kv_tokens = count = 0
        ending: list[int] = []
        while self._prompts and budget > 0:
            request, start = self._prompts[0]
            length = self._prompt_tokens[request] - start
            if not chunked and length > budget and tokens:
                break
            part = min(length, budget) if chunked else length
            tokens += part
            pairs += attention_pairs(start, part)
            kv_tokens += start + part
            count += 1
            budget -= part
            if part < length:
                self._prompts[0][1] += part
                break
            self._prompts.popleft()
            ending.append(request)
        load = StepLoad(
            tokens, count, pairs, kv_tokens, decoding, self._kv_tokens if decoding else 0, decoding + len(ending)
        )
        self._now_s += self._cost.step(load).interval_s
        if decoding:
            self._steps += 1
            self._kv_tokens += decoding
        for request in ending:
            self._first_token_s[request] = self._now_s
            heapq.heappush(self._running, (self._steps + self._output_tokens[request] - 1, request))
            self._kv_tokens += self._prompt_tokens[request] + 1

    def _full_chunks(self, until_s: float) -> bool:
        """Several steps of the first prompt's chunks that have the whole budget and do not end it; False if the next
        steps are of another kind."""
        if self._kind.policy == "prompt_first":
            return False
        request, start = self._prompts[0]
        decoding = len(self._running)
        part = self._kind.max_batch_tokens - decoding
        count = (self._prompt_tokens[request] - start - 1) // part if part > 0 else 0
        if decoding:
            count = min(count, self._running[0][0] - self._steps)
        if count < _MIN_FULL_CHUNKS:
            return False
        first_s, last_s = (
            self._cost.step(
                StepLoad(
                    prefill_tokens=part,
                    prefill_sequences=1,
                    prefill_pairs=attention_pairs(start + index * part, part),
                    prefill_kv_tokens=start + (index + 1) * part,
                    decode_sequences=decoding,
                    decode_kv_tokens=self._kv_tokens + index * decoding,
                    sampled=decoding,
                )
            ).interval_s
            for index in (0, count - 1)
        )
        growth_s = (last_s - first_s) / (count - 1)
        count = int(min(count, steps_until(until_s - self._now_s, first_s, growth_s)))
        self._now_s += count * first_s + growth_s * (count * (count - 1) / 2)
        self._prompts[0][1] += count * part
        if decoding:
            self._steps += count
            self._kv_tokens += count * decoding
        return True

    def _decode(self, until_s: float) -> None:
        batch = len(self._running)
        if batch not in self._coefficients:
            self._coefficients[batch] = self._cost.decode_coefficients(batch)
        base_s, per_token_s = self._coefficients[batch]
        first_s, growth_s = base_s + per_token_s * self._kv_tokens, per_token_s * batch
        count = int(min(self._running[0][0] - self._steps, steps_until(until_s - self._now_s, first_s, growth_s)))
        self._now_s += count * first_s + growth_s * (count * (count - 1) / 2)
        self._steps += count
        self._kv_tokens += count * batch

    def _finish(self) -> None:
        while self._running and self._running[0][0] <= self._steps:
            _, request = heapq.heappop(self._running)
            self._finished_s[request] = self._now_s
            tokens = self._prompt_tokens[request] + self._output_tokens[request]
            self._kv_tokens -= tokens
            self._reserved_tokens -= tokens

    def _admit(self) -> None:
        while self._waiting and len(self._prompts) + len(self._running) < self._kind.max_batch:
            request = self._waiting[0]
            tokens = self._prompt_tokens[request] + self._output_tokens[request]
            if self._reserved_tokens and self._reserved_tokens + tokens > self._kind.kv_tokens:
                return
            self._waiting.popleft()
            self._prompts.append([request, 0])
            self._reserved_tokens += tokens
