"""Tokens without workers: a `TokenGenerator` that answers from a script."""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Self

from tandem.core.clock import Clock, SystemClock
from tandem.core.errors import DuplicateRequestError, TandemError, UnavailableError
from tandem.core.generation import BlockNamer
from tandem.core.request import FinishReason, GenerationRequest, SampledToken, TokenLogprob
from tandem.core.timeline import Stage, Timeline

Script = Callable[[GenerationRequest], Iterable[int]]


class ScriptedGeneration:
    """A `Generation` that draws the script's tokens, up to max_tokens, a stop token, or its failure."""

    def __init__(self, generator: "ScriptedGenerator", request: GenerationRequest, received_s: float) -> None:
        self.request = request
        self.finish_reason: FinishReason | None = None
        self.prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
        self.is_closed = False
        self.was_cut_short = False
        self._generator = generator
        self._script = iter(generator.script(request))
        self._drawn = 0
        self._is_drawn_out = False
        now_s = generator.clock.now_s()
        self._stamps = {Stage.RECEIVED: received_s, Stage.ADMITTED: now_s}

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[SampledToken, ...]:
        if self.is_closed or self._is_drawn_out:
            self._end()
            raise StopAsyncIteration
        if self._generator.delay_s is not None:
            await asyncio.sleep(self._generator.delay_s)
        if (error := self._generator.failures.get(self._drawn)) is not None:
            self._end()
            raise error
        tokens = self._draw()
        self._stamps.setdefault(Stage.FIRST_TOKEN, self._generator.clock.now_s())
        if self.request.sampling.prompt_logprobs is not None and self.prompt_logprobs is None:
            scored = tuple(TokenLogprob(token_id, -0.5, ((token_id, -0.5),)) for token_id in self.request.token_ids[1:])
            self.prompt_logprobs = (None, *scored)
        return tokens

    def _draw(self) -> tuple[SampledToken, ...]:
        tokens: list[SampledToken] = []
        while len(tokens) < self._generator.tokens_per_step and not self._is_drawn_out:
            token_id = next(self._script)
            self._drawn += 1
            tokens.append(SampledToken(token_id, self._logprob(token_id)))
            if token_id in self.request.sampling.stop_token_ids:
                self.finish_reason = FinishReason.STOP
            elif self._drawn == self.request.sampling.max_tokens:
                self.finish_reason = FinishReason.LENGTH
            self._is_drawn_out = self.finish_reason is not None
        return tuple(tokens)

    def _logprob(self, token_id: int) -> TokenLogprob | None:
        count = self.request.sampling.logprobs
        if count is None:
            return None
        return TokenLogprob(token_id, -0.25, tuple((rank, -0.25 - rank) for rank in range(count)))

    def _end(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self._generator.ended(self)
            self._stamps[Stage.FINISHED] = self._generator.clock.now_s()

    async def aclose(self) -> None:
        self.was_cut_short = self.was_cut_short or not (self.is_closed or self._is_drawn_out)
        self._end()

    def explanation(self) -> str:
        return "[]"

    def timeline(self) -> Timeline:
        num_prompt_tokens = len(self.request.token_ids)
        return Timeline(dict(self._stamps), num_prompt_tokens, num_prompt_tokens // 2, self._drawn)


@dataclass
class ScriptedGenerator:
    """`failures` maps a number of drawn tokens to the error that comes then; `refusal` is raised at once.

    `delay_s` None draws without ever waiting.
    """

    script: Script
    max_model_len_or_none: int | None = 512
    delay_s: float | None = 0.0
    tokens_per_step: int = 1
    failures: dict[int, TandemError] = field(default_factory=dict)
    refusal: TandemError | None = None
    clock: Clock = field(default_factory=SystemClock)
    requests: list[GenerationRequest] = field(default_factory=list)
    generations: list[ScriptedGeneration] = field(default_factory=list)
    clients: list[str] = field(default_factory=list)
    running: dict[str, ScriptedGeneration] = field(default_factory=dict)

    @property
    def max_model_len(self) -> int:
        if self.max_model_len_or_none is None:
            raise UnavailableError("no worker is ready")
        return self.max_model_len_or_none

    async def name_blocks(self, token_ids: tuple[int, ...], cache_salt: str) -> BlockNamer:
        return lambda block_size: ()

    def start(
        self, request: GenerationRequest, received_s: float, name_blocks: BlockNamer | None = None, client: str = ""
    ) -> ScriptedGeneration:
        if self.refusal is not None:
            raise self.refusal
        if request.request_id in self.running:
            raise DuplicateRequestError(f"a request with the id '{request.request_id}' is running")
        generation = ScriptedGeneration(self, request, received_s)
        self.requests.append(request)
        self.clients.append(client)
        self.generations.append(generation)
        self.running[request.request_id] = generation
        return generation

    def ended(self, generation: ScriptedGeneration) -> None:
        del self.running[generation.request.request_id]
