"""Requests to a running colocated instance, each stream and each probe of what serving adds several times.

A core and a cache that are shared with others are up to three times slower at some moments than at others, for a
fraction of a second or for many. Others only slow things down, so the fastest third of what is repeated counts: of the
probes to which costs are fitted, and of each request's TTFT and of its TPOT, which take as long as the probes.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from bench.load.run import run_load
from tandem.placement.simulator.result import SimulationResult
from tandem.placement.workload.requests import RequestStream
from tandem.profiling.cluster import MODEL_NAME
from tandem.profiling.completion_client import CompletionClient
from tandem.profiling.serving_profile import ServingProbe
from tandem.profiling.serving_samples import ColocatedSamples, LoadPeriod

_COUNTED_SHARE = 1 / 3
_WARM_UP_S = 1.0
_PROMPTS_S = 0.8  # of prompts one after the other
_MAX_PAUSE_S = 0.2  # before each of them
_DECODE_S = 0.3
_BATCHES = (1, 4, 16)
_OUTPUT_RANGE = (16, 32)
_PARTS = frozenset({"prefill_s"})

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LiveRepeats:
    """`results[i]`: of stream i, each repeat. `samples`: what counts of the probes between them."""

    samples: ColocatedSamples
    results: Sequence[Sequence[SimulationResult]]


async def serve_repeatedly(url: str, streams: Sequence[RequestStream], repeats: int) -> LiveRepeats:
    """Raises MeasurementError."""
    client = CompletionClient(url)
    probe = ServingProbe(client, needed_parts=_PARTS)
    results: list[list[SimulationResult]] = [[] for _ in streams]
    samples = ColocatedSamples()
    try:
        await probe.decode(2, _WARM_UP_S, _OUTPUT_RANGE)
        for repeat in range(repeats):
            for index, stream in enumerate(streams):
                samples += await _probed(probe, repeat + index)
                result = await run_load(client, stream, MODEL_NAME, with_timelines=True)
                results[index].append(result.as_simulation())
    finally:
        client.close()
    return LiveRepeats(_fastest_samples(samples), results)


async def _probed(probe: ServingProbe, turn: int) -> ColocatedSamples:
    """Prompts, or sequences that decode, in turns."""
    if turn % 2:
        return ColocatedSamples(prompted=tuple(await probe.prefill_alone(_PROMPTS_S, max_pause_s=_MAX_PAUSE_S)))
    batch = _BATCHES[turn // 2 % len(_BATCHES)]
    return ColocatedSamples(decoding=(LoadPeriod(await probe.decode(batch, _DECODE_S, _OUTPUT_RANGE), batch=batch),))


def _fastest_samples(samples: ColocatedSamples) -> ColocatedSamples:
    prompted = _fastest_of_each(samples.prompted, lambda one: one.num_prompt_tokens, lambda one: one.parts["prefill_s"])
    decoding = _fastest_of_each(samples.decoding, lambda one: one.batch, _step_s)
    return ColocatedSamples(tuple(prompted), tuple(decoding))


def _fastest_of_each(items: Iterable[T], kind_of: Callable[[T], Hashable], seconds: Callable[[T], float]) -> list[T]:
    kinds: dict[Hashable, list[T]] = defaultdict(list)
    for item in items:
        kinds[kind_of(item)].append(item)
    return [item for of_kind in kinds.values() for item in _fastest(of_kind, seconds)]


def _fastest(items: Sequence[T], seconds: Callable[[T], float]) -> list[T]:
    return sorted(items, key=seconds)[: num_counted(len(items))]


def num_counted(repeats: int) -> int:
    return math.ceil(_COUNTED_SHARE * repeats)


def _step_s(period: LoadPeriod) -> float:
    """Mean seconds from one token of a decoding request to its next one."""
    decode_s = sum(request.client_total_s - request.client_ttft_s for request in period.decoding)
    return decode_s / sum(request.num_decode_steps for request in period.decoding)
