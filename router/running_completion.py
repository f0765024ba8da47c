"""A completion that runs: the choices of all its prompts, as one stream of deltas.

The other choices of a prompt start when the first one has its first token: the prompt's KV is then in the prefix cache,
and they cost almost no prefill.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tandem.core.completion import CompletionRequest, TextDelta
from tandem.core.generation import BlockNamer, Generation, TokenGenerator
from tandem.core.request import GenerationRequest
from tandem.router.choice_stream import ChoiceStream
from tandem.router.stop import StopStrings
from tandem.router.tokenizer import TextTokenizer

_LONG_PROMPT_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class PromptChoices:
    """The generations of one prompt, one for each choice."""

    requests: tuple[GenerationRequest, ...]
    name_blocks: BlockNamer

    async def pause(self) -> None:
        """After one of them has been started: a long prompt takes milliseconds to send."""
        if len(self.requests[0].token_ids) > _LONG_PROMPT_TOKENS:
            await asyncio.sleep(0)


class RunningCompletion:
    """A `core.completion.OpenCompletion`. `on_close` is called once, at the end."""

    def __init__(
        self,
        prompts: tuple[PromptChoices, ...],
        request: CompletionRequest,
        generator: TokenGenerator,
        tokenizer: TextTokenizer,
        on_close: Callable[[], None],
    ) -> None:
        self._on_close: Callable[[], None] | None = on_close
        self._prompts = prompts
        self._stop_strings = StopStrings(request.stop) if request.stop else None
        self._received_s = request.received_s
        self._echo = request.echo
        self._tenant = request.tenant or request.client
        self._generator = generator
        self._tokenizer = tokenizer
        self._generations: list[Generation] = []
        self._leaders: list[ChoiceStream] = []
        self._iterator: AsyncGenerator[TextDelta, None] | None = None
        self._queue: asyncio.Queue[TextDelta | asyncio.Task[None]] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def prompt_token_ids(self) -> tuple[tuple[int, ...], ...]:
        return tuple(prompt.requests[0].token_ids for prompt in self._prompts)

    def explanation(self) -> str:
        return self._generations[0].explanation()

    async def start(self) -> None:
        """Start the first choice of every prompt. Raises what `TokenGenerator.start` raises."""
        for position, prompt in enumerate(self._prompts):
            self._leaders.append(self._choice(prompt, 0, position * len(prompt.requests)))
            await prompt.pause()

    def _choice(self, prompt: PromptChoices, position: int, index: int) -> ChoiceStream:
        generation = self._generator.start(
            prompt.requests[position], self._received_s, prompt.name_blocks, self._tenant
        )
        self._generations.append(generation)
        return ChoiceStream(index, generation, self._tokenizer, self._stop_strings, echo=self._echo)

    def __aiter__(self) -> AsyncIterator[TextDelta]:
        assert self._iterator is None, "the deltas are given once"
        single = len(self._prompts) == 1 and len(self._prompts[0].requests) == 1
        self._iterator = self._leaders[0].deltas() if single else self._merged()
        return self._iterator

    async def _merged(self) -> AsyncGenerator[TextDelta, None]:
        """A task puts its deltas into the queue, and the task itself when it is done."""
        for leader, prompt in zip(self._leaders, self._prompts, strict=True):
            self._spawn(leader, prompt)
        while self._tasks:
            item = await self._queue.get()
            if isinstance(item, TextDelta):
                yield item
            else:
                self._tasks.discard(item)
                item.result()

    def _spawn(self, choice: ChoiceStream, leads: PromptChoices | None = None) -> None:
        task = asyncio.create_task(self._pump(choice, leads))
        task.add_done_callback(self._queue.put_nowait)
        self._tasks.add(task)

    async def _pump(self, choice: ChoiceStream, leads: PromptChoices | None) -> None:
        """The first choice starts the others of its prompt, `leads`."""
        async for delta in choice.deltas():
            self._queue.put_nowait(delta)
            if leads is not None:
                for position in range(1, len(leads.requests)):
                    self._spawn(self._choice(leads, position, choice.index + position))
                    await leads.pause()
                leads = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End all generations that still run. May be called again."""
        try:
            if self._iterator is not None:
                await self._iterator.aclose()
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.gather(*self._tasks, return_exceptions=True)
            for generation in self._generations:
                await generation.aclose()
        finally:
            if self._on_close is not None:
                self._on_close()
                self._on_close = None
