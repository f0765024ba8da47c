"""CPU time of a router process for its clients' requests, with scripted workers."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from bench.overhead.clients import Api, StreamingClient, complete_all, connect
from bench.overhead.figures import OverheadSample, Quantity
from bench.overhead.launcher import CHECKOUT, OverheadLauncher, cpu_s
from tandem.profiling.cluster import StartedRouter

STREAMS = (1, 8, 32)
STEP_S = 0.01
_IDLE_S = 2.0
SHORT_TOKENS = 2  # the fewest that need a prefill and a decode worker


@dataclass(frozen=True, slots=True)
class RouterVariant:
    """One of the routers that take turns: its checkout, and settings of the section `router`."""

    name: str = ""
    checkout: Path = CHECKOUT
    settings: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Case:
    name: str
    router: StartedRouter
    idle_share: float  # CPU seconds per second without any request
    clients: Sequence[StreamingClient]


async def measure_routers(
    launcher: OverheadLauncher,
    variants: Sequence[RouterVariant],
    num_rounds: int,
    num_tokens: int,
    num_short: int,
) -> list[OverheadSample]:
    samples: list[OverheadSample] = []
    async with AsyncExitStack() as stack:
        cases = []
        for variant in variants:
            router = await launcher.start_router_of(variant.checkout, variant.settings)
            await launcher.start_scripted_workers(router, STEP_S)
            idle_share = await _idle_share(router)
            for api in Api:
                clients = await stack.enter_async_context(connect(router, api, max(STREAMS)))
                await complete_all(clients, SHORT_TOKENS)  # warm-up
                title = f"{api.value}, {variant.name}" if variant.name else api.value
                cases.append(_Case(title, router, idle_share, clients))
        for num_streams in STREAMS * num_rounds:
            for case in cases:
                samples += await _measure(case, num_streams, num_tokens, num_short)
    return sorted(samples, key=lambda sample: (sample.quantity.name, sample.num_streams))


def rounds_of_short(num_streams: int, num_short: int) -> int:
    """Number of short requests of each client: few clients send more of them, for a steadier figure."""
    return max(num_short, 16 * num_short // num_streams)


async def _idle_share(router: StartedRouter) -> float:
    began_s, before_s = time.monotonic(), cpu_s(router.process)
    await asyncio.sleep(_IDLE_S)
    return (cpu_s(router.process) - before_s) / (time.monotonic() - began_s)


async def _measure(case: _Case, num_streams: int, num_tokens: int, num_short: int) -> list[OverheadSample]:
    """Short and long requests: two equations for the costs of a request and of a further token."""
    clients = case.clients[:num_streams]
    rounds = rounds_of_short(num_streams, num_short)
    short_s = await _busy_cpu_s(case, clients, SHORT_TOKENS, rounds) / (num_streams * rounds)
    long_s = await _busy_cpu_s(case, clients, num_tokens, 1) / num_streams
    per_token_s = (long_s - short_s) / (num_tokens - SHORT_TOKENS)
    per_request_s = short_s - SHORT_TOKENS * per_token_s
    return [
        OverheadSample(case.name, num_streams, Quantity.PER_REQUEST, "CPU", per_request_s),
        OverheadSample(case.name, num_streams, Quantity.PER_TOKEN, "CPU", per_token_s),
    ]


async def _busy_cpu_s(case: _Case, clients: Sequence[StreamingClient], num_tokens: int, rounds: int) -> float:
    began_s, before_s = time.monotonic(), cpu_s(case.router.process)
    await complete_all(clients, num_tokens, rounds=rounds)
    idle_s = case.idle_share * (time.monotonic() - began_s)
    return cpu_s(case.router.process) - before_s - idle_s
