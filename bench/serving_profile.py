"""Measures what running workers add to the engine's steps, and the road around them, on a cluster of one of each role.

On one machine the two workers share memory, caches and cores, so each is measured alone and while the other computes.
Answers of a few dozen tokens, as many at once as a batch is to have, keep decode busy. One prompt after another, at
once or after a pause, keeps prefill busy; several at once show what transfers cost each other. What their timelines and
clients say is compared with the cost model of the engine by itself (`bench.serving_fit`).
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

from bench.load_client import LoadClient, Stamped
from bench.load_run import FIRST_ID, LAST_ID
from bench.processes import MODEL_NAME, BenchError, Launcher
from bench.serving_fit import Answers, Decoded, Prompted
from placement.costs.calibration import CalibratedCost, Terms
from placement.costs.serving import RoadCosts, ServingCosts

_LENGTHS = (32, 384, 64, 160)  # of prompts, in turns
_BATCHES = (1, 2, 4, 8, 16)
_SHORT_PROMPT = 4  # of decode's answers: next to nothing, in whatever step of prefill it comes to be
_ANSWER_TOKENS = (16, 48)  # at least, at most: answers that end together would leave decode idle meanwhile
_CLIENTS = 4  # whose prompts come to be computed, and carried, together
_LONGEST_PAUSE_S = 0.3  # between prompts: the first step after a pause takes longer
_TIMEOUT_S = 60.0


async def measure_serving(
    model: Path,
    engine: Mapping[str, object],
    terms: Terms,
    kv_bytes_per_token: float,
    budget_s: float,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[ServingCosts, RoadCosts]:
    """Starts a cluster whose instances have the settings `engine`, measures for about `budget_s`, and ends it.

    Raises BenchError."""
    async with Launcher(model) as launcher:
        router = await launcher.router()
        await launcher.workers(router, engine)
        return await measure_running(f"http://{router.http}", terms, kv_bytes_per_token, budget_s, progress)


async def measure_running(
    url: str,
    terms: Terms,
    kv_bytes_per_token: float,
    budget_s: float,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[ServingCosts, RoadCosts]:
    """The same of a cluster of one worker of each role that runs already and has nothing else to do.

    Raises BenchError."""
    client = LoadClient(url)
    try:
        probe = Probe(client)
        await probe.run(batch=2, duration_s=1.0, max_tokens=3)  # first touches
        measured = Answers()
        for index, batch in enumerate(_BATCHES):
            part_s = budget_s / len(_BATCHES)
            # Answers of one token leave decode to the others; those of three show the transfer.
            measured.prompted_alone += await probe.prompts(0.15 * part_s, max_tokens=3)
            measured.decoded_alone.append(await probe.decode(batch, 0.2 * part_s))
            for longest_pause_s in (0.0, _LONGEST_PAUSE_S):
                prompted, decoded = await probe.run(batch, 0.25 * part_s, 1, longest_pause_s=longest_pause_s)
                measured.prompted_beside += [one for one in prompted if decoded.is_busy(one.began_s, one.ended_s)]
                if longest_pause_s == 0:
                    measured.decoded_beside.append(decoded)
            measured.carried_beside.append(await probe.run(batch, 0.15 * part_s, max_tokens=3, clients=_CLIENTS))
            progress((index + 1) / len(_BATCHES))
    finally:
        client.close()
    if not measured.is_enough:
        raise BenchError(f"in {budget_s:.0f} s no prompt was answered beside decode; measure for longer")
    return measured.serving(CalibratedCost(terms)), measured.road(kv_bytes_per_token)


class Probe:
    """Sends what keeps both workers busy, and collects what comes of it."""

    def __init__(self, client: LoadClient) -> None:
        self._client = client
        self._lengths = cycle(_LENGTHS)
        self._draw = Random()  # not the same prompts again, which would be in the cluster's prefix cache

    async def run(
        self, batch: int, duration_s: float, max_tokens: int, *, longest_pause_s: float = 0.0, clients: int = 1
    ) -> tuple[list[Prompted], Decoded]:
        """`batch` answers at once for about `duration_s`, and as long as they last prompts of some clients, who each
        send one after the other."""
        prompted: list[Prompted] = []
        prompting = [
            asyncio.create_task(self._prompt_on(prompted, max_tokens, longest_pause_s), name=f"prompts-{client}")
            for client in range(clients)
        ]
        decoded = await self.decode(batch, duration_s)
        for task in prompting:
            task.cancel()
        ended = await asyncio.gather(*prompting, return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception):
                raise error
        return prompted, decoded

    async def prompts(self, duration_s: float, max_tokens: int) -> list[Prompted]:
        """Prompts one after the other for `duration_s`, at least one, each answered by some tokens; nothing else."""
        began_s = time.monotonic()
        prompted = [await self._prompt(max_tokens)]
        while time.monotonic() - began_s < duration_s:
            prompted.append(await self._prompt(max_tokens))
        return prompted

    async def decode(self, batch: int, duration_s: float) -> Decoded:
        """`batch` clients for `duration_s`, each with one answer after the other."""
        began_s = time.monotonic()
        answers: list[Stamped] = []
        num_tokens: list[int] = []

        async def ask_on() -> None:
            while not answers or time.monotonic() - began_s < duration_s:
                length = self._draw.randint(*_ANSWER_TOKENS)
                answers.append(await self._ask(_SHORT_PROMPT, length))
                num_tokens.append(length)

        await asyncio.gather(*(ask_on() for _ in range(batch)))
        return Decoded(
            batch=batch,
            kv_tokens=_SHORT_PROMPT + sum(n * n for n in num_tokens) / sum(num_tokens) / 2,
            num_steps=sum(num_tokens) - len(num_tokens),
            spans=tuple((_decode_began_s(answer), answer.last_s) for answer in answers),
        )

    async def _prompt_on(self, answers: list[Prompted], max_tokens: int, longest_pause_s: float) -> None:
        while True:
            paused_s = self._draw.uniform(0.0, longest_pause_s)
            await asyncio.sleep(paused_s)
            answers.append(await self._prompt(max_tokens, paused_s))

    async def _prompt(self, max_tokens: int, paused_s: float = 0.0) -> Prompted:
        num_tokens = next(self._lengths)
        return _prompted(num_tokens, await self._ask(num_tokens, max_tokens), paused_s)

    async def _ask(self, num_tokens: int, max_tokens: int) -> Stamped:
        prompt = [self._draw.randrange(FIRST_ID, LAST_ID) for _ in range(num_tokens)]
        request = self._client.completion_request(MODEL_NAME, prompt, max_tokens, with_timeline=True)
        stamped = await self._client.ask(request, _TIMEOUT_S)
        if stamped.error is not None or stamped.first_s is None:
            raise BenchError(f"the measured cluster failed: {stamped.error}")
        return stamped


def _decode_began_s(stamped: Stamped) -> float:
    """When its KV was there and a step could take it."""
    assert stamped.first_s is not None
    parts = _timeline(stamped)["parts"]
    return stamped.first_s + float(parts.get("transfer_s", 0.0) + parts.get("decode_queue_s", 0.0))


def _prompted(num_tokens: int, stamped: Stamped, paused_s: float) -> Prompted:
    assert stamped.first_s is not None
    timeline = _timeline(stamped)
    return Prompted(
        num_tokens=num_tokens,
        paused_s=paused_s,
        began_s=stamped.first_s - timeline["parts"]["prefill_s"],
        first_s=stamped.first_s - stamped.sent_s,
        whole_s=stamped.last_s - stamped.sent_s,
        ttft_s=timeline["ttft_s"],
        total_s=timeline["total_s"],
        parts=timeline["parts"],
    )


def _timeline(stamped: Stamped) -> dict[str, Any]:
    assert stamped.usage is not None
    extra = stamped.usage["tandem"]
    assert isinstance(extra, dict), "timelines were asked for"
    timeline: dict[str, Any] = extra["timeline"]
    return timeline
