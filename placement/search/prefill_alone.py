"""Prefill alone, as DistServe's Algorithm 1 has it: decode is taken to be infinitely fast.

A quick model of `scheduling.prefill` under a router that sends a prompt to whoever is free first: one queue in order of
arrival, servers that take from it as many prompt tokens as one step allows, longer prompts in chunks. It ranks
configurations thousands of times faster than the simulator, which has the last word.
"""

import heapq

import numpy as np

from tandem.core.cost_model import CostModel, StepLoad, attention_pairs
from tandem.placement.workload.requests import Floats


def ttft_alone(
    times: "StepTimes", arrival_s: Floats, prompt_tokens: list[int], *, instances: int, max_batch_tokens: int
) -> Floats:
    """Seconds from arrival to the first token, of each request, in order of arrival."""
    arrivals = arrival_s.tolist()
    num_requests = len(arrivals)
    first_token_s = [0.0] * num_requests
    free = [(0.0, server) for server in range(instances)]  # when each can start its next step
    begun: dict[int, tuple[int, int]] = {}  # server -> the prompt it has computed a part of, and how much
    following = 0
    while free:
        now_s, server = free[0]
        if server not in begun:
            if following == num_requests:
                heapq.heappop(free)
                continue
            now_s = max(now_s, arrivals[following])
        budget = max_batch_tokens
        chunks: list[tuple[int, int]] = []  # start and number of tokens
        ending: list[int] = []
        if server in begun:
            request, start = begun.pop(server)
        else:
            request, start = following, 0
            following += 1
        while True:
            count = min(budget, prompt_tokens[request] - start)
            chunks.append((start, count))
            budget -= count
            if start + count < prompt_tokens[request]:
                begun[server] = (request, start + count)
                break
            ending.append(request)
            if budget == 0 or following == num_requests or arrivals[following] > now_s:
                break
            request, start = following, 0
            following += 1
        total_s, interval_s = times.of(chunks, len(ending))
        for request in ending:
            first_token_s[request] = now_s + total_s
        heapq.heapreplace(free, (now_s + interval_s, server))
    return np.asarray(first_token_s) - arrival_s


class StepTimes:
    """(total_s, interval_s) of steps; those of one whole prompt, by far the most, are asked for once."""

    __slots__ = ("_cost", "_whole")

    def __init__(self, cost: CostModel) -> None:
        self._cost = cost
        self._whole: dict[int, tuple[float, float]] = {}

    def of(self, chunks: list[tuple[int, int]], num_ending: int) -> tuple[float, float]:
        if len(chunks) > 1 or chunks[0][0] or not num_ending:
            return self._ask(chunks, num_ending)
        length = chunks[0][1]
        if length not in self._whole:
            self._whole[length] = self._ask(chunks, 1)
        return self._whole[length]

    def _ask(self, chunks: list[tuple[int, int]], num_ending: int) -> tuple[float, float]:
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
