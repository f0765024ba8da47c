"""What a client waits for beyond the engine's steps, and the CPU time around them, with every process in its place."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from bench.figures import Quantity, Sample
from bench.processes import Launcher, Process, Router
from bench.router_cost import SHORT_TOKENS, STREAMS
from bench.streams import Answer, Api, Client, ask_all, connect
from core.session import Role

_REPORT_S = 0.4  # after so long the last heartbeat has told of the last step


@dataclass(frozen=True, slots=True)
class _Cluster:
    router: Router
    workers: dict[Role, Process]

    async def step_s(self) -> dict[Role, float]:
        """Time each role has spent in steps so far."""
        await asyncio.sleep(_REPORT_S)
        return {status.role: status.step_s for status in await self.router.instances()}

    def cpu_s_by_thread(self) -> list[dict[int, float]]:
        return [process.cpu_s_by_thread() for process in (self.router.process, *self.workers.values())]


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


async def measure_road(launcher: Launcher, num_rounds: int, num_tokens: int, num_short: int) -> list[Sample]:
    samples: list[Sample] = []
    async with AsyncExitStack() as stack:
        router = await launcher.router()
        cluster = _Cluster(router, await launcher.workers(router))
        clients = {api: await stack.enter_async_context(connect(router, api, max(STREAMS))) for api in Api}
        for api in Api:
            await ask_all(clients[api], SHORT_TOKENS, label="first")
        for index in range(num_rounds):
            for api in Api:
                label = f"{index}-{api.name}"
                samples += await _per_request(cluster, api, clients[api][:1], 8 * num_short, f"{label}-short")
                for num_streams in STREAMS:
                    samples += await _per_token(
                        cluster, api, clients[api][:num_streams], num_tokens, f"{label}-{num_streams}"
                    )
    return sorted(samples, key=lambda sample: (sample.quantity.name, sample.clock, sample.num_streams))


async def _per_request(cluster: _Cluster, api: Api, clients: Sequence[Client], rounds: int, label: str) -> list[Sample]:
    """One request after the other; of each, the time that is in none of its two steps."""
    steps_s, threads = await cluster.step_s(), cluster.cpu_s_by_thread()
    answers = await ask_all(clients, SHORT_TOKENS, rounds=rounds, label=label)
    cpu_s = cpu_beside_engine_s(threads, cluster.cpu_s_by_thread())
    computed_s = sum((await cluster.step_s()).values()) - sum(steps_s.values())
    waited_s = sum(answer.last_s - answer.sent_s for answer in answers)
    return [
        Sample(api.value, 1, Quantity.PER_REQUEST, "wall", (waited_s - computed_s) / len(answers)),
        Sample(api.value, 1, Quantity.PER_REQUEST, "CPU", cpu_s / len(answers)),
    ]


async def _per_token(
    cluster: _Cluster, api: Api, clients: Sequence[Client], num_tokens: int, label: str
) -> list[Sample]:
    """From the first of the second tokens to the last token of all, decode always has something to do."""
    steps_s, threads = await cluster.step_s(), cluster.cpu_s_by_thread()
    answers = await ask_all(clients, num_tokens, label=label)
    cpu_s = cpu_beside_engine_s(threads, cluster.cpu_s_by_thread())
    computed_s = (await cluster.step_s())[Role.DECODE] - steps_s[Role.DECODE]
    total_tokens = len(answers) * (num_tokens - 1)
    return [
        Sample(api.value, len(clients), Quantity.PER_TOKEN, "wall", (_decode_s(answers) - computed_s) / total_tokens),
        Sample(api.value, len(clients), Quantity.PER_TOKEN, "CPU", cpu_s / total_tokens),
    ]


def _decode_s(answers: Sequence[Answer]) -> float:
    return max(answer.last_s for answer in answers) - min(answer.first_s for answer in answers)
