"""In which order waiting requests are dispatched. Pure functions.

fcfs     first come, first served
edf      the earliest deadline of a first token first (TTFT target); requests without one follow
goodput  as edf, but when not all can be on time, the fewest are left out, and follow: Moore's algorithm
"""

import heapq
from collections.abc import Sequence
from typing import Literal, NamedTuple

QueueOrder = Literal["fcfs", "edf", "goodput"]


class Job(NamedTuple):
    """`service_s` is its time on the one machine that all wait for; it should have ended at `due_s`. `weight` is what
    it is worth to end in time."""

    due_s: float
    service_s: float
    weight: float = 1.0


def left_out(jobs: Sequence[Job], now_s: float) -> set[int]:
    """Indices of the jobs that cannot all be on time; the others are, in the order of their due times.

    With equal weights they are the fewest possible (Moore 1968, "An n job, one machine sequencing algorithm for
    minimizing the number of late jobs", with Hodgson's simplification). With other weights the one that takes most time
    for its weight is left out first, which is not always optimal. O(n log n).
    """
    order = sorted(range(len(jobs)), key=lambda index: jobs[index].due_s)
    kept: list[tuple[float, int]] = []  # the longest for its weight is first
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
