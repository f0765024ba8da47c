"""Requests with known answers, sent faster than they can be answered; and what became of them."""

import asyncio
import hashlib
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
import psutil
from tqdm import tqdm

from tandem.client import AsyncClient
from tandem.core.errors import OverloadedError, TandemError
from tandem.profiling.serving_profile import FIRST_TOKEN_ID, LAST_TOKEN_ID

SAMPLE_S = 2.0  # between two looks at the processes' memory


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, how many tokens to ask for, and the answer of an undisturbed cluster."""

    token_ids: tuple[int, ...]
    max_tokens: int
    answer: tuple[int, ...] = ()


@dataclass(slots=True)
class Outcome:
    """What became of the requests of one phase. `outcomes` counts "answered", "wrong" and the codes of errors."""

    duration_s: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)
    ttft_s: list[float] = field(default_factory=list)  # from sending to the first token, of answered requests
    refused_after_s: list[float] = field(default_factory=list)
    num_tokens: int = 0  # of answers
    num_attempts: int = 0
    first_error: str = ""
    memory: dict[str, list[tuple[float, int]]] = field(default_factory=dict)  # by process: (seconds, resident bytes)

    @property
    def num_sent(self) -> int:
        return self.outcomes.total()

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.duration_s


def draw_questions(count: int, seed: int) -> list[Question]:
    """Prompts of 100 to 1,500 tokens and answers of 16 to 128, log-uniform."""
    rng = np.random.default_rng(seed)
    prompts = np.exp(rng.uniform(np.log(100), np.log(1500), count)).astype(int)
    answers = np.exp(rng.uniform(np.log(16), np.log(128), count)).astype(int)
    return [
        Question(tuple(rng.integers(FIRST_TOKEN_ID, LAST_TOKEN_ID, length).tolist()), int(answer))
        for length, answer in zip(prompts, answers, strict=True)
    ]


async def answer_alone(client: AsyncClient, question: Question) -> Question:
    """The question with its answer, asked while nothing else runs."""
    completion = await client.generate(
        token_ids=question.token_ids, max_tokens=question.max_tokens, temperature=0.0, ignore_eos=True
    )
    return Question(question.token_ids, question.max_tokens, completion.token_ids)


class Phase:
    """One load on the cluster. Requests differ in their cache salt, so no prompt is found in a cache."""

    def __init__(
        self, client: AsyncClient, questions: list[Question], pids: dict[str, int], bar: "tqdm[NoReturn]"
    ) -> None:
        self._client = client
        self._questions = questions
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        self._bar = bar
        self._number = 0
        self._began_s = time.monotonic()
        self.outcome = Outcome(memory={name: [] for name in pids})

    async def saturate(self, clients: int, seconds: float) -> Outcome:
        """`clients` clients, each of which asks again as soon as it has an answer. Throughput counts what is answered
        within `seconds`."""

        async def ask_again() -> None:
            while time.monotonic() < self._began_s + seconds:
                await self._ask()

        asking = [asyncio.create_task(ask_again()) for _ in range(clients)]
        await self._watch_until(self._began_s + seconds)
        tokens = self.outcome.num_tokens
        await asyncio.gather(*asking)
        self.outcome.num_tokens, self.outcome.duration_s = tokens, seconds
        return self.outcome

    async def overload(self, rate: float, seconds: float, seed: int) -> Outcome:
        """Requests at random times, `rate` a second in the mean, whether or not others are answered. Throughput counts
        what is answered within `seconds`, the outcome all."""
        rng = np.random.default_rng(seed)
        asking: set[asyncio.Task[None]] = set()

        async def send() -> None:
            due_s = self._began_s
            while (due_s := due_s + rng.exponential(1 / rate)) < self._began_s + seconds:
                await asyncio.sleep(due_s - time.monotonic())
                task = asyncio.create_task(self._ask())
                asking.add(task)
                task.add_done_callback(asking.discard)

        sending = asyncio.create_task(send())
        await self._watch_until(self._began_s + seconds)
        tokens = self.outcome.num_tokens
        await sending
        await asyncio.gather(*asking)
        self.outcome.num_tokens, self.outcome.duration_s = tokens, seconds
        return self.outcome

    async def _ask(self) -> None:
        self._number += 1
        question = self._questions[self._number % len(self._questions)]
        salt = hashlib.sha256(f"{self._began_s} {self._number}".encode()).hexdigest()
        outcome, sent_s, first_s, tokens = self.outcome, time.monotonic(), None, list[int]()
        try:
            async with self._client.stream(
                token_ids=question.token_ids,
                max_tokens=question.max_tokens,
                temperature=0.0,
                ignore_eos=True,
                cache_salt=salt,
            ) as stream:
                async for delta in stream:
                    first_s = first_s or time.monotonic()
                    tokens += delta.token_ids
                    if delta.timeline is not None:
                        outcome.num_attempts += delta.timeline.num_attempts
        except TandemError as error:
            outcome.outcomes[error.code] += 1
            if isinstance(error, OverloadedError):
                outcome.refused_after_s.append(time.monotonic() - sent_s)
            elif not outcome.first_error:
                outcome.first_error = str(error)
        else:
            outcome.outcomes["answered" if tuple(tokens) == question.answer else "wrong"] += 1
            outcome.num_tokens += len(tokens)
            if first_s is not None:
                outcome.ttft_s.append(first_s - sent_s)
        self._bar.update()

    async def _watch_until(self, end_s: float) -> None:
        while (now_s := time.monotonic()) < end_s:
            for name, process in self._processes.items():
                self.outcome.memory[name].append((now_s - self._began_s, process.memory_info().rss))
            await asyncio.sleep(min(SAMPLE_S, end_s - now_s))
