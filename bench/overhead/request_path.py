"""Time that a client waits beyond the engine's steps, and CPU time around them, on a complete cluster."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack

from bench.overhead.clients import Api, StreamingClient, complete_all, connect
from bench.overhead.figures import OverheadSample, Quantity
from bench.overhead.launcher import OverheadLauncher, cpu_s_by_thread
from bench.overhead.router_cost import SHORT_TOKENS, STREAMS, rounds_of_short
from tandem.core.config import WorkerConfig
from tandem.core.session import InstanceStatus, Role
from tandem.profiling.cluster import StartedProcess, StartedRouter
from tandem.wire.channels import open_channel
from tandem.wire.fleet import describe_fleet

_ENGINE = {"threads": 1, "kv_memory": "256MiB"}
_REPORT_S = WorkerConfig.model_fields["heartbeat_s"].default + 0.2  # until a heartbeat has reported the last step


class _Meter:
    """The time that a router and its workers have spent since the last reading."""

    def __init__(self, router: StartedRouter, workers: Sequence[StartedProcess], cluster_token: str) -> None:
        self._router = router
        self._cluster_token = cluster_token
        self._processes = (router.process, *workers)
        self._step_s: dict[Role, float] = {}
        self._cpu_s: list[dict[int, float]] = []

    async def begin(self) -> None:
        await asyncio.sleep(_REPORT_S)
        self._step_s = {status.role: status.step_s for status in await self._instances()}
        self._cpu_s = [cpu_s_by_thread(process) for process in self._processes]

    async def read(self) -> tuple[float, dict[Role, float]]:
        """(CPU time without the engine, time of each role in steps) in seconds, and begin again."""
        cpu_before, steps_before = self._cpu_s, self._step_s
        cpu_s = cpu_without_engine_s(cpu_before, [cpu_s_by_thread(process) for process in self._processes])
        await self.begin()
        return cpu_s, {role: step_s - steps_before[role] for role, step_s in self._step_s.items()}

    async def _instances(self) -> tuple[InstanceStatus, ...]:
        async with open_channel(self._router.control, self._cluster_token) as channel:
            return (await describe_fleet(channel, timeout_s=10.0)).instances


def cpu_without_engine_s(before: Sequence[dict[int, float]], after: Sequence[dict[int, float]]) -> float:
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


async def measure_request_path(
    launcher: OverheadLauncher, num_rounds: int, num_tokens: int, num_short: int
) -> list[OverheadSample]:
    samples: list[OverheadSample] = []
    async with AsyncExitStack() as stack:
        router = await launcher.start_router()
        workers = await launcher.start_workers(router, _ENGINE)
        meter = _Meter(router, list(workers.values()), launcher.cluster_token)
        clients = {api: await stack.enter_async_context(connect(router, api, max(STREAMS))) for api in Api}
        for api in Api:
            await complete_all(clients[api], SHORT_TOKENS, label="first")
        await meter.begin()
        for index in range(num_rounds):
            for num_streams in STREAMS:
                for api in Api:
                    label = f"{index}-{api.name}-{num_streams}"
                    asking = clients[api][:num_streams]
                    samples += await _measure(meter, api.value, asking, num_tokens, num_short, label)
    return sorted(samples, key=lambda sample: (sample.quantity.name, sample.clock, sample.num_streams))


async def _measure(
    meter: _Meter, subject: str, clients: Sequence[StreamingClient], num_tokens: int, num_short: int, label: str
) -> list[OverheadSample]:
    """Short and long requests: two equations for the CPU time of a request and of a further token."""
    num_streams = len(clients)
    rounds = rounds_of_short(num_streams, num_short)
    short = await complete_all(clients, SHORT_TOKENS, rounds=rounds, label=f"{label}-short")
    short_cpu_s, short_steps_s = await meter.read()
    long = await complete_all(clients, num_tokens, label=f"{label}-long")
    long_cpu_s, long_steps_s = await meter.read()
    token_cpu_s = (long_cpu_s / num_streams - short_cpu_s / len(short)) / (num_tokens - SHORT_TOKENS)
    request_cpu_s = short_cpu_s / len(short) - SHORT_TOKENS * token_cpu_s
    # From the first of the first tokens to the last token of all, decode is nearly always busy.
    decode_s = max(stream.last_s for stream in long) - min(stream.first_s for stream in long)
    token_wall_s = (decode_s - long_steps_s[Role.DECODE]) / (num_streams * (num_tokens - 1))
    samples = [
        OverheadSample(subject, num_streams, Quantity.PER_REQUEST, "CPU", request_cpu_s),
        OverheadSample(subject, num_streams, Quantity.PER_TOKEN, "CPU", token_cpu_s),
        OverheadSample(subject, num_streams, Quantity.PER_TOKEN, "wall", token_wall_s),
    ]
    if num_streams == 1:  # with more, requests wait for each other's steps, which is time of the engine
        waited_s = sum(stream.last_s - stream.sent_s for stream in short)
        request_wall_s = (waited_s - sum(short_steps_s.values())) / len(short)
        samples.append(OverheadSample(subject, num_streams, Quantity.PER_REQUEST, "wall", request_wall_s))
    return samples
