"""A fast model of the prefill phase with infinitely fast decode, as in DistServe's Algorithm 1.

The model has one queue in order of arrival. An instance that becomes free takes prompts from the queue up to its budget
of prompt tokens per step, long prompts in chunks. Chunks that fill their steps have a closed form. This approximates
`scheduling.scheduler` and is thousands of times faster than the simulator.
"""

import heapq

import numpy as np

from tandem.core.cost_model import CostModel, StepLoad, attention_pairs
from tandem.placement.workload.requests import Floats

_MIN_FULL_CHUNKS = 3  # of fewer steps each is computed
_ROUNDED_TOKENS = 64


def prefill_ttft_s(
    times: "StepTimes", arrival_s: Floats, prompt_tokens: list[int], *, instances: int, max_batch_tokens: int
) -> Floats:
    """Seconds from arrival to the first token of each request, in order of arrival."""
    arrivals = arrival_s.tolist()
    num_requests = len(arrivals)
    first_token_s = [0.0] * num_requests
    free = [(0.0, instance) for instance in range(instances)]  # when each instance can start its next step
    partial: dict[int, tuple[int, int]] = {}  # instance -> (prompt in progress, its computed tokens)
    following = 0
    while free:
        now_s, instance = free[0]
        if instance not in partial:
            if following == num_requests:
                heapq.heappop(free)
                continue
            now_s = max(now_s, arrivals[following])
        budget = max_batch_tokens
        chunks: list[tuple[int, int]] = []  # start and number of tokens
        ending: list[int] = []
        if instance in partial:
            request, start = partial.pop(instance)
        else:
            request, start = following, 0
            following += 1
        num_full = (prompt_tokens[request] - start - 1) // max_batch_tokens
        if num_full >= _MIN_FULL_CHUNKS:
            partial[instance] = (request, start + num_full * max_batch_tokens)
            heapq.heapreplace(free, (now_s + times.of_full_chunks(start, max_batch_tokens, num_full), instance))
            continue
        while True:
            count = min(budget, prompt_tokens[request] - start)
            chunks.append((start, count))
            budget -= count
            if start + count < prompt_tokens[request]:
                partial[instance] = (request, start + count)
                break
            ending.append(request)
            if budget == 0 or following == num_requests or arrivals[following] > now_s:
                break
            request, start = following, 0
            following += 1
        total_s, interval_s = times.of(chunks, len(ending))
        for request in ending:
            first_token_s[request] = now_s + total_s
        heapq.heapreplace(free, (now_s + interval_s, instance))
    return np.asarray(first_token_s) - arrival_s


class StepTimes:
    """(total_s, interval_s) of steps. Steps of one complete prompt, the most frequent ones, are cached by length. Steps
    of one chunk that does not end its prompt are cached by its length and its rounded beginning, on which their time
    depends little."""

    __slots__ = ("_by_length", "_chunks", "_cost")

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self._by_length: dict[int, tuple[float, float]] = {}
        self._chunks: dict[tuple[int, int], tuple[float, float]] = {}

    def of(self, chunks: list[tuple[int, int]], num_ending: int) -> tuple[float, float]:
        start, length = chunks[0]
        if len(chunks) == 1 and not num_ending:
            return self._of_chunk(start, length)
        if len(chunks) > 1 or start:
            return self._compute(chunks, num_ending)
        if length not in self._by_length:
            self._by_length[length] = self._compute(chunks, 1)
        return self._by_length[length]

    def of_full_chunks(self, start: int, num_tokens: int, count: int) -> float:
        """Seconds of `count` steps of `num_tokens` tokens of one prompt each, from token `start` on, that do not end
        it. Their times grow by nearly equal amounts."""
        (_, first_s), (_, last_s) = (self._of_chunk(start + index * num_tokens, num_tokens) for index in (0, count - 1))
        return count * (first_s + last_s) / 2

    def _of_chunk(self, start: int, num_tokens: int) -> tuple[float, float]:
        key = round(start / _ROUNDED_TOKENS) * _ROUNDED_TOKENS, num_tokens
        times = self._chunks.get(key)
        if times is None:
            times = self._chunks[key] = self._compute([key], 0)
        return times

    def _compute(self, chunks: list[tuple[int, int]], num_ending: int) -> tuple[float, float]:
        step = self._cost.step(
            StepLoad(
                prefill_tokens=sum(count for _, count in chunks),
                prefill_sequences=len(chunks),
                prefill_pairs=sum(attention_pairs(start, count) for start, count in chunks),
                prefill_kv_tokens=sum(start + count for start, count in chunks),
                sampled=num_ending,
            )
        )
        return step.total_s, step.interval_s
