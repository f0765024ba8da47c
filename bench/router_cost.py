"""CPU time of a router process for its clients' requests, in front of workers that only keep the pace."""

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from bench.figures import Quantity, Sample
from bench.processes import Launcher, Router
from bench.streams import Api, Client, ask_all, connect

STREAMS = (1, 8, 32)
STEP_S = 0.01
_IDLE_S = 2.0
SHORT_TOKENS = 2  # the least that takes a prefill and a decode worker


@dataclass(frozen=True, slots=True)
class _Case:
    name: str
    router: Router
    idle_share: float  # CPU seconds per second that it takes with no request at all
    clients: Sequence[Client]


async def measure_routers(
    launcher: Launcher, against: Path | None, num_rounds: int, num_tokens: int, num_short: int
) -> list[Sample]:
    """Of this checkout's router, and of the one in the folder `against`, if there is one."""
    samples: list[Sample] = []
    async with AsyncExitStack() as stack:
        cases = []
        for name, root in (("here", None), ("there", against)):
            if name == "there" and root is None:
                continue
            router = await launcher.router(root)
            await launcher.scripted_workers(router, STEP_S)
            idle_share = await _idle_share(router)
            for api in Api:
                clients = await stack.enter_async_context(connect(router, api, max(STREAMS)))
                await ask_all(clients, SHORT_TOKENS)  # first touches
                title = api.value if against is None else f"{api.value}, {name}"
                cases.append(_Case(title, router, idle_share, clients))
        for num_streams in STREAMS * num_rounds:
            for case in cases:
                samples += await _measure(case, num_streams, num_tokens, num_short)
    return sorted(samples, key=lambda sample: (sample.quantity.name, sample.num_streams))


def rounds_of_short(num_streams: int, num_short: int) -> int:
    """How many short answers each client asks for: few clients ask more often, for a steadier figure."""
    return max(num_short, 16 * num_short // num_streams)


async def _idle_share(router: Router) -> float:
    begun_s, cpu_s = time.monotonic(), router.process.cpu_s()
    await asyncio.sleep(_IDLE_S)
    return (router.process.cpu_s() - cpu_s) / (time.monotonic() - begun_s)


async def _measure(case: _Case, num_streams: int, num_tokens: int, num_short: int) -> list[Sample]:
    """Short answers and long ones: two equations for what a request costs and what a further token does."""
    clients = case.clients[:num_streams]
    rounds = rounds_of_short(num_streams, num_short)
    short_s = await _cpu_s(case, clients, SHORT_TOKENS, rounds) / (num_streams * rounds)
    long_s = await _cpu_s(case, clients, num_tokens, 1) / num_streams
    per_token_s = (long_s - short_s) / (num_tokens - SHORT_TOKENS)
    per_request_s = short_s - SHORT_TOKENS * per_token_s
    return [
        Sample(case.name, num_streams, Quantity.PER_REQUEST, "CPU", per_request_s),
        Sample(case.name, num_streams, Quantity.PER_TOKEN, "CPU", per_token_s),
    ]


async def _cpu_s(case: _Case, clients: Sequence[Client], num_tokens: int, rounds: int) -> float:
    begun_s, cpu_s = time.monotonic(), case.router.process.cpu_s()
    await ask_all(clients, num_tokens, rounds=rounds)
    idle_s = case.idle_share * (time.monotonic() - begun_s)
    return case.router.process.cpu_s() - cpu_s - idle_s
