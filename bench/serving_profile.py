"""Measures what running workers add to the engine's steps, and the road around them, on a cluster of one of each role.

On one machine the two workers share memory, caches and cores, so each is measured alone and while the other computes.
Answers of a few dozen tokens, as many at once as a batch is to have, keep decode busy; that they come and go is part of
what is measured, since steps after a pause find colder caches. One prompt after another, each waiting for nobody, keeps
prefill busy.
What their timelines and clients say is compared with the cost model of the engine by itself.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import numpy as np
from scipy.optimize import nnls

from bench.load_client import LoadClient, Stamped
from bench.load_run import FIRST_ID, LAST_ID
from bench.processes import MODEL_NAME, BenchError, Launcher
from core.cost_model import StepLoad
from placement.costs.calibration import CalibratedCost, Knots, RoadCosts, ServingCosts, Terms

_LENGTHS = (32, 256, 64, 160)  # of prompts, in turns
_BATCHES = (1, 2, 4, 8, 16)
_SHORT_PROMPT = 16
_ANSWER_TOKENS = 32
_TIMEOUT_S = 60.0
_FASTEST_BYTES_PER_S = 1e12  # where no time per token can be seen


@dataclass(frozen=True, slots=True)
class Prompted:
    """A short answer: its prompt's length, what its client waited, and the parts of its timeline."""

    num_tokens: int
    first_s: float  # since it was sent
    whole_s: float
    ttft_s: float  # as the server has it
    total_s: float
    parts: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Decoded:
    """Answers of `batch` clients, each of whom asks again at once. `spans`: from when to when each answer had its
    steps, `steps_each` of them. `kv_tokens`: of one sequence, on average."""

    batch: int
    kv_tokens: float
    steps_each: int
    spans: tuple[tuple[float, float], ...]


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
    cost = CalibratedCost(terms)
    client = LoadClient(url)
    try:
        probe = _Probe(client, cost)
        await probe.run(batch=2, duration_s=1.0, max_tokens=3)  # first touches
        measured = _Measured()
        for index, batch in enumerate(_BATCHES):
            part_s = budget_s / len(_BATCHES)
            measured.prompted_alone += await probe.prompts(0.15 * part_s)
            measured.decoded_alone.append(await probe.decode(batch, 0.2 * part_s))
            # Prompts answered by one token leave decode to the others; those of three show the transfer.
            prompted, decoded = await probe.run(batch, 0.5 * part_s, max_tokens=1)
            measured.prompted_beside += prompted
            measured.decoded_beside.append(decoded)
            measured.carried += (await probe.run(batch, 0.15 * part_s, max_tokens=3))[0]
            progress((index + 1) / len(_BATCHES))
    finally:
        client.close()
    serving = ServingCosts(
        prefill_alone=prefill_factor(cost, measured.prompted_alone),
        prefill_beside=prefill_factor(cost, measured.prompted_beside),
        decode_alone=decode_factors(cost, measured.decoded_alone),
        decode_beside=decode_factors(cost, measured.decoded_beside),
    )
    answered = [*measured.prompted_alone, *measured.prompted_beside]
    return serving, road_costs(answered, measured.carried, kv_bytes_per_token)


@dataclass(slots=True)
class _Measured:
    """What was collected so far: while the other worker had nothing to do, beside a busy one, and with a transfer."""

    prompted_alone: list[Prompted] = field(default_factory=list)
    prompted_beside: list[Prompted] = field(default_factory=list)
    decoded_alone: list[Decoded] = field(default_factory=list)
    decoded_beside: list[Decoded] = field(default_factory=list)
    carried: list[Prompted] = field(default_factory=list)


def prefill_factor(cost: CalibratedCost, prompted: Sequence[Prompted]) -> float:
    """Time taken over time predicted; each prompt was computed in a step of its own."""
    taken_s = sum(one.parts["prefill_s"] for one in prompted)
    return taken_s / sum(cost.step(StepLoad.of_prompts(one.num_tokens)).total_s for one in prompted)


def decode_factors(cost: CalibratedCost, decoded: Sequence[Decoded]) -> Knots:
    """By batch: time taken over time predicted."""
    return tuple((one.batch, _predicted_steps(cost, one) / (one.steps_each * len(one.spans))) for one in decoded)


def _predicted_steps(cost: CalibratedCost, decoded: Decoded) -> float:
    """How many steps all answers together would have had in their spans, with as many at once as there were."""
    changes = sorted([(start_s, 1) for start_s, _ in decoded.spans] + [(end_s, -1) for _, end_s in decoded.spans])
    steps, at_once = 0.0, 0
    for (at_s, change), (next_s, _) in pairwise(changes):
        at_once += change
        if at_once:
            base_s, per_token_s = cost.decode_line(at_once)
            steps += at_once * (next_s - at_s) / (base_s + at_once * decoded.kv_tokens * per_token_s)
    return steps


def road_costs(answered: Sequence[Prompted], carried: Sequence[Prompted], kv_bytes_per_token: float) -> RoadCosts:
    """`answered` had one token, `carried` a transfer."""
    before = [one.parts["admission_s"] + one.parts["dispatch_s"] + one.parts["prefill_queue_s"] for one in answered]
    lengths = np.array([one.num_tokens for one in carried], dtype=np.float64)
    transfers_s = np.array([one.parts["transfer_s"] for one in carried])
    medians = [(n, float(np.median(transfers_s[lengths == n]))) for n in np.unique(lengths)]
    matrix = np.column_stack((np.ones(len(medians)), [n for n, _ in medians]))
    (latency_s, per_token_s), _ = nnls(matrix, np.array([seconds for _, seconds in medians]))
    return RoadCosts(
        admission_s=median(before),
        first_token_s=max(0.0, median(one.first_s - one.ttft_s for one in answered)),
        token_s=max(0.0, median(one.whole_s - one.total_s for one in answered)),
        transfer_latency_s=float(latency_s),
        transfer_bytes_per_s=min(_FASTEST_BYTES_PER_S, kv_bytes_per_token / max(float(per_token_s), 1e-15)),
    )


class _Probe:
    """Sends what keeps both workers busy, and collects what comes of it."""

    def __init__(self, client: LoadClient, cost: CalibratedCost) -> None:
        self._client = client
        self._cost = cost
        self._draw = Random(0)

    async def run(self, batch: int, duration_s: float, max_tokens: int) -> tuple[list[Prompted], Decoded]:
        """`batch` answers at once for about `duration_s`, and prompts one after the other as long as they last."""
        prompted: list[Prompted] = []
        prompting = asyncio.create_task(self._prompt_on(prompted, max_tokens), name="prompts")
        decoded = await self.decode(batch, duration_s)
        prompting.cancel()
        with suppress(asyncio.CancelledError):
            await prompting
        return prompted, decoded

    async def prompts(self, duration_s: float) -> list[Prompted]:
        """Prompts one after the other, each answered by one token, and no decode."""
        prompted: list[Prompted] = []
        with suppress(TimeoutError):
            async with asyncio.timeout(duration_s):
                await self._prompt_on(prompted, max_tokens=1)
        return prompted

    async def decode(self, batch: int, duration_s: float) -> Decoded:
        """`batch` clients for `duration_s`, each with one answer after the other."""
        began_s = time.monotonic()
        answers: list[Stamped] = []

        async def ask_on() -> None:
            while not answers or time.monotonic() - began_s < duration_s:
                answers.append(await self._ask(_SHORT_PROMPT, _ANSWER_TOKENS))

        await asyncio.gather(*(ask_on() for _ in range(batch)))
        return Decoded(
            batch=batch,
            kv_tokens=_SHORT_PROMPT + _ANSWER_TOKENS / 2,
            steps_each=_ANSWER_TOKENS - 1,
            spans=tuple((_decode_began_s(answer), answer.last_s) for answer in answers),
        )

    async def _prompt_on(self, answers: list[Prompted], max_tokens: int) -> None:
        while True:
            num_tokens = _LENGTHS[len(answers) % len(_LENGTHS)]
            stamped = await self._ask(num_tokens, max_tokens)
            answers.append(_prompted(num_tokens, stamped))

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


def _prompted(num_tokens: int, stamped: Stamped) -> Prompted:
    assert stamped.first_s is not None
    timeline = _timeline(stamped)
    return Prompted(
        num_tokens=num_tokens,
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
