"""The orders in which waiting requests are dispatched. Pure functions.

fcfs     first come, first served
edf      the earliest due time of a first token (TTFT target) first; requests without a target follow
goodput  as edf, but when not all can be on time, as few as possible are left out and follow: Moore's algorithm
"""

import heapq
from collections.abc import Sequence
from typing import Literal, NamedTuple

QueueOrder = Literal["fcfs", "edf", "goodput"]


class Job(NamedTuple):
    """One job of a single machine: it takes `service_s`, and is on time if it ends by `due_s`. `weight` is the worth of
    being on time."""

    due_s: float
    service_s: float
    weight: float = 1.0


def left_out(jobs: Sequence[Job], now_s: float) -> set[int]:
    """Indices of the jobs to leave out, so that all others are on time when they run in the order of their due times.

    With equal weights these are as few as possible (Moore 1968, "An n job, one machine sequencing algorithm for
    minimizing the number of late jobs", with Hodgson's simplification). With other weights the job that takes the most
    time for its weight is left out first, which is not always optimal. O(n log n).
    """
    order = sorted(range(len(jobs)), key=lambda index: jobs[index].due_s)
    kept: list[tuple[float, int]] = []  # heap: the job that takes the most time for its weight is first
    out: set[int] = set()
    end_s = now_s
    for index in order:
        job = jobs[index]
        heapq.heappush(kept, (-job.service_s / job.weight, index))
        end_s += job.service_s
        while end_s > job.due_s and kept:
            _, longest = heapq.heappop(kept)
            end_s -= jobs[longest].service_s
            out.add(longest)
    return out
