"""What a client waits for beyond the engine's steps, and the CPU time around them, with every process in its place."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack

from bench.figures import Quantity, Sample
from bench.processes import HEARTBEAT_S, Launcher, Process, Router
from bench.router_cost import SHORT_TOKENS, STREAMS, rounds_of_short
from bench.streams import Api, Client, ask_all, connect
from tandem.core.session import Role

_REPORT_S = HEARTBEAT_S + 0.2  # after so long a heartbeat has told of the last step


class _Meter:
    """What a router and its workers have spent since the last reading."""

    def __init__(self, router: Router, workers: Sequence[Process]) -> None:
        self._router = router
        self._processes = (router.process, *workers)
        self._step_s: dict[Role, float] = {}
        self._cpu_s: list[dict[int, float]] = []

    async def begin(self) -> None:
        await asyncio.sleep(_REPORT_S)
        self._step_s = {status.role: status.step_s for status in await self._router.instances()}
        self._cpu_s = [process.cpu_s_by_thread() for process in self._processes]

    async def read(self) -> tuple[float, dict[Role, float]]:
        """(CPU time beside the engine, time of each role in steps), in seconds; then it begins anew."""
        cpu_before, steps_before = self._cpu_s, self._step_s
        cpu_s = cpu_beside_engine_s(cpu_before, [process.cpu_s_by_thread() for process in self._processes])
        await self.begin()
        return cpu_s, {role: step_s - steps_before[role] for role, step_s in self._step_s.items()}


def cpu_beside_engine_s(before: Sequence[dict[int, float]], after: Sequence[dict[int, float]]) -> float:
    """CPU time of a router and its workers, by thread, without each worker's busiest thread but the first.

    The threads of the router come first. A worker's first thread is its event loop; the busiest other one computes.
    """
    spent = [
        {thread: cpu_s - earlier.get(thread, 0.0) for thread, cpu_s in later.items()}
        for earlier, later in zip(before, after, strict=True)
    ]
    total_s = sum(sum(threads.values()) for threads in spent)
    computing_s = sum(max(cpu_s for thread, cpu_s in worker.items() if thread != min(worker)) for worker in spent[1:])
    return total_s - computing_s


async def measure_request_path(launcher: Launcher, num_rounds: int, num_tokens: int, num_short: int) -> list[Sample]:
    samples: list[Sample] = []
    async with AsyncExitStack() as stack:
        router = await launcher.router()
        meter = _Meter(router, list((await launcher.workers(router)).values()))
        clients = {api: await stack.enter_async_context(connect(router, api, max(STREAMS))) for api in Api}
        for api in Api:
            await ask_all(clients[api], SHORT_TOKENS, label="first")
        await meter.begin()
        for index in range(num_rounds):
            for num_streams in STREAMS:
                for api in Api:
                    label = f"{index}-{api.name}-{num_streams}"
                    asked = clients[api][:num_streams]
                    samples += await _measure(meter, api.value, asked, num_tokens, num_short, label)
    return sorted(samples, key=lambda sample: (sample.quantity.name, sample.clock, sample.num_streams))


async def _measure(
    meter: _Meter, what: str, clients: Sequence[Client], num_tokens: int, num_short: int, label: str
) -> list[Sample]:
    """Short answers and long ones: two equations for the CPU time of a request and of a further token."""
    num_streams = len(clients)
    rounds = rounds_of_short(num_streams, num_short)
    short = await ask_all(clients, SHORT_TOKENS, rounds=rounds, label=f"{label}-short")
    short_cpu_s, short_steps_s = await meter.read()
    long = await ask_all(clients, num_tokens, label=f"{label}-long")
    long_cpu_s, long_steps_s = await meter.read()
    token_cpu_s = (long_cpu_s / num_streams - short_cpu_s / len(short)) / (num_tokens - SHORT_TOKENS)
    request_cpu_s = short_cpu_s / len(short) - SHORT_TOKENS * token_cpu_s
    # From the first of the first tokens to the last token of all, decode nearly always has something to do.
    decode_s = max(answer.last_s for answer in long) - min(answer.first_s for answer in long)
    token_wall_s = (decode_s - long_steps_s[Role.DECODE]) / (num_streams * (num_tokens - 1))
    samples = [
        Sample(what, num_streams, Quantity.PER_REQUEST, "CPU", request_cpu_s),
        Sample(what, num_streams, Quantity.PER_TOKEN, "CPU", token_cpu_s),
        Sample(what, num_streams, Quantity.PER_TOKEN, "wall", token_wall_s),
    ]
    if num_streams == 1:  # with more, requests wait for each other's steps, and that is the engine's time
        waited_s = sum(answer.last_s - answer.sent_s for answer in short)
        request_wall_s = (waited_s - sum(short_steps_s.values())) / len(short)
        samples.append(Sample(what, num_streams, Quantity.PER_REQUEST, "wall", request_wall_s))
    return samples
