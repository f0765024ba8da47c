"""Measures what running workers add to the engine's steps, and the request path around them, on a small cluster.

On one machine the two workers share memory, caches and cores, so each is measured alone and while the other computes.
Answers of a few dozen tokens, as many at once as a batch is to have, keep decode busy. One prompt after another, at
once or after a pause, keeps prefill busy; several at once show what transfers cost each other. What their timelines and
clients say is compared with the cost model of the engine by itself (`bench.serving_fit`).
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from itertools import cycle
from pathlib import Path
from random import Random

from bench.load_client import LoadClient
from bench.load_run import FIRST_ID, LAST_ID
from bench.processes import MODEL_NAME, BenchError, Launcher
from bench.serving_answers import Answers, Loaded, Prompted

_LENGTHS = (32, 384, 64, 160)  # of prompts, in turns
_BATCHES = (1, 2, 4, 8)
_SHORT_PROMPT = 4  # of decode's answers: next to nothing, in whatever step of prefill it comes to be
_TOKENS_AFTER_PROMPT = 3  # the fewest that show a transfer and a step of decode after it
# Of answers, at least and at most, in turns: those that end together would leave decode idle meanwhile, and the shorter
# they are, the more requests come.
_ANSWER_TOKENS = ((8, 24), (16, 48), (24, 72), (40, 100))
_LONG_ANSWERS = _ANSWER_TOKENS[-1]  # their own prompts, which would fill prefill's pauses, come seldom
_CROWD = 8  # clients whose prompts come to be computed, and carried, together
_LONGEST_PAUSE_S = 0.3  # between prompts: the first step after a pause takes longer
_TIMEOUT_S = 60.0


async def measure_serving(
    model: Path,
    engine: Mapping[str, object],
    budget_s: float,
    progress: Callable[[float], None] = lambda share: None,
    *,
    max_model_len: int | None = None,
) -> Answers:
    """Starts a cluster whose instances have the settings `engine`, measures for about `budget_s`, and ends it.
    `max_model_len`: of the model; None: long enough for all that is asked here.

    Raises BenchError."""
    async with Launcher(model) as launcher:
        router = await launcher.router()
        await launcher.workers(router, engine)
        return await measure_running(f"http://{router.http}", budget_s, progress, max_model_len=max_model_len)


async def measure_running(
    url: str,
    budget_s: float,
    progress: Callable[[float], None] = lambda share: None,
    *,
    max_model_len: int | None = None,
) -> Answers:
    """The same of a cluster of one worker of each role that runs already and has nothing else to do.

    Raises BenchError."""
    measured = Answers()
    async with probing(url, max_model_len) as probe:
        await probe.steady(batch=2, duration_s=1.0)  # first touches
        for index, batch in enumerate(_BATCHES):
            measured.add(await probe.part(batch, budget_s / len(_BATCHES)))
            progress((index + 1) / len(_BATCHES))
    if not measured.is_enough:
        raise BenchError(f"in {budget_s:.0f} s no prompt was answered beside decode; measure for longer")
    return measured


@asynccontextmanager
async def probing(url: str, max_model_len: int | None = None) -> AsyncIterator["Probe"]:
    client = LoadClient(url)
    try:
        yield Probe(client, max_model_len)
    finally:
        client.close()


class Probe:
    """Sends what keeps both workers busy, and collects what comes of it."""

    def __init__(self, client: LoadClient, max_model_len: int | None = None) -> None:
        self._client = client
        longest = max(_LENGTHS) if max_model_len is None else max_model_len - max(most for _, most in _ANSWER_TOKENS)
        self._lengths = cycle(min(length, longest) for length in _LENGTHS)
        self._answer_tokens = cycle(_ANSWER_TOKENS)
        self._draw = Random()  # not the same prompts again, which would be in the cluster's prefix cache

    async def part(self, batch: int, duration_s: float) -> Answers:
        """A bit of everything, beside `batch` answers at once."""
        alone = await self.prompts(0.1 * duration_s)
        decoded = Loaded(await self.decode(batch, 0.15 * duration_s, next(self._answer_tokens)))
        steady = await self.steady(batch, 0.25 * duration_s)
        paused = await self.run(batch, 0.25 * duration_s, _LONG_ANSWERS, clients=1, longest_pause_s=_LONGEST_PAUSE_S)
        crowded = await self.run(batch, 0.25 * duration_s, next(self._answer_tokens), clients=_CROWD)
        return Answers(alone, [decoded], [steady], [paused], [crowded])

    async def steady(self, batch: int, duration_s: float) -> Loaded:
        """Prefill has one prompt after the other, and sends one while it computes the next."""
        return await self.run(batch, duration_s, next(self._answer_tokens), clients=2)

    async def run(
        self,
        batch: int,
        duration_s: float,
        answer_tokens: tuple[int, int],
        *,
        clients: int,
        longest_pause_s: float = 0.0,
    ) -> Loaded:
        """`batch` answers at once for about `duration_s`, and as long as they last prompts of some clients, who each
        send one after the other."""
        prompted: list[Prompted] = []
        prompting = [
            asyncio.create_task(self._prompt_on(prompted, longest_pause_s), name=f"prompts-{client}")
            for client in range(clients)
        ]
        decoded = await self.decode(batch, duration_s, answer_tokens)
        for task in prompting:
            task.cancel()
        ended = await asyncio.gather(*prompting, return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception):
                raise error
        return Loaded(decoded, tuple(prompted))

    async def prompts(self, duration_s: float) -> list[Prompted]:
        """Prompts one after the other for `duration_s`, at least one; nothing else."""
        began_s = time.monotonic()
        prompted = [await self._prompt()]
        while time.monotonic() - began_s < duration_s:
            prompted.append(await self._prompt())
        return prompted

    async def decode(self, batch: int, duration_s: float, answer_tokens: tuple[int, int]) -> tuple[Prompted, ...]:
        """`batch` clients for `duration_s`, each with one answer after the other, of at least and at most so many
        tokens."""
        began_s = time.monotonic()
        answers: list[Prompted] = []

        async def ask_on() -> None:
            while not answers or time.monotonic() - began_s < duration_s:
                answers.append(await self._ask(_SHORT_PROMPT, self._draw.randint(*answer_tokens)))

        await asyncio.gather(*(ask_on() for _ in range(batch)))
        return tuple(answers)

    async def _prompt_on(self, answers: list[Prompted], longest_pause_s: float) -> None:
        while True:
            await asyncio.sleep(self._draw.uniform(0.0, longest_pause_s))
            answers.append(await self._prompt())

    async def _prompt(self) -> Prompted:
        return await self._ask(next(self._lengths), _TOKENS_AFTER_PROMPT)

    async def _ask(self, num_tokens: int, max_tokens: int) -> Prompted:
        prompt = [self._draw.randrange(FIRST_ID, LAST_ID) for _ in range(num_tokens)]
        request = self._client.completion_request(MODEL_NAME, prompt, max_tokens, with_timeline=True)
        stamped = await self._client.ask(request, _TIMEOUT_S)
        if stamped.error is not None or stamped.first_s is None:
            raise BenchError(f"the measured cluster failed: {stamped.error}")
        assert stamped.usage is not None
        extra = stamped.usage["tandem"]
        assert isinstance(extra, dict), "timelines were asked for"
        return Prompted.seen(num_tokens, max_tokens, stamped.sent_s, stamped.first_s, stamped.last_s, extra["timeline"])
