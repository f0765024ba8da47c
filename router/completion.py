"""The text side of a request: tokenize the prompts, start one generation per choice, turn tokens into deltas of text.

    CompletionRequest -> prompt ids -> one TokenGenerator.start per choice -> TextDelta, ..., Finish

Several choices of one prompt are several generations with seeds derived from one. The other choices start when the
first one has its first token: the prompt's KV is then in the prefix cache, and they cost almost no prefill.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from types import TracebackType
from typing import Self

from tandem.core.completion import (
    ChatPrompt,
    CompletionRequest,
    Finish,
    Prompt,
    SamplingDefaults,
    ServedModel,
    TextDelta,
    TextPrompt,
    TokenPrompt,
)
from tandem.core.errors import ModelNotFoundError, OverloadedError, TandemError, UnavailableError
from tandem.core.generation import BlockNamer, Generation, TokenGenerator
from tandem.core.request import FinishReason, GenerationRequest, SampledToken
from tandem.core.request_slo import RequestSlo
from tandem.core.router_section import RouterSection
from tandem.router.limits import check_request, clipped, logprobs_limit, output_limit
from tandem.router.stop import StopMatcher, StopStrings
from tandem.router.tokenizer import TextTokenizer

_LONG_PROMPT_TOKENS = 4096
_SEED_MASK = (1 << 63) - 1
_NO_DEFAULTS = SamplingDefaults()


def derive_seed(seed: int, choice: int) -> int:
    """Seed of a choice in [0, 2^63): choice 0 has the given one, the others a mix of both (splitmix64)."""
    if choice == 0:
        return seed & _SEED_MASK
    mixed = (seed + choice * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (mixed ^ (mixed >> 31)) & _SEED_MASK


class ChoiceStream:
    """The deltas of one choice, from the tokens of its generation."""

    def __init__(
        self,
        index: int,
        generation: Generation,
        tokenizer: TextTokenizer,
        stop_strings: StopStrings | None,
        *,
        echo: bool = False,
    ) -> None:
        self.index = index
        self._generation = generation
        self._detokenizer = tokenizer.detokenizer(generation.request.token_ids, keeps_prompt_end=echo)
        self._matcher = None if stop_strings is None else StopMatcher(stop_strings)
        self._stop_ids = frozenset(generation.request.sampling.stop_token_ids)
        self._num_tokens = 0

    async def deltas(self) -> AsyncGenerator[TextDelta, None]:
        """Ends after the delta with a finish; closes the generation in every case."""
        try:
            wants_prompt = self._generation.request.sampling.prompt_logprobs is not None
            async for tokens in self._generation:
                self._num_tokens += len(tokens)
                delta, found = self._read(tokens)
                if wants_prompt:
                    delta = delta._replace(prompt_logprobs=self._generation.prompt_logprobs)
                    wants_prompt = False
                if found:
                    self._generation.finish_reason = FinishReason.STOP
                    await self._generation.aclose()
                    yield delta._replace(finish=self._finish(FinishReason.STOP))
                    return
                yield delta
            text, found = self._rest()
            reason = FinishReason.STOP if found else self._generation.finish_reason
            assert reason is not None, "a generation that ends without an error has a finish reason"
            yield TextDelta(self.index, text, finish=self._finish(reason))
        finally:
            await self._generation.aclose()

    def _read(self, tokens: tuple[SampledToken, ...]) -> tuple[TextDelta, bool]:
        """The delta, and whether it ends the choice because of a stop string.

        Only the last token can be a stop token: the workers end the generation with it.
        """
        stop_token = None
        if tokens[-1].token_id in self._stop_ids:
            tokens, stop_token = tokens[:-1], tokens[-1]
        push = self._detokenizer.push
        text = push(tokens[0].token_id) if len(tokens) == 1 else "".join([push(token.token_id) for token in tokens])
        if self._matcher is None:
            return TextDelta(self.index, text, tokens, stop_token), False
        text, found = self._matcher.push(text)
        return TextDelta(self.index, text, tokens, stop_token), found

    def _rest(self) -> tuple[str, bool]:
        """Text that was held back until the last token, and whether it completes a stop string."""
        text = self._detokenizer.flush()
        if self._matcher is None:
            return text, False
        text, found = self._matcher.push(text)
        return text if found else text + self._matcher.flush(), found

    def _finish(self, reason: FinishReason) -> Finish:
        return Finish(reason, self._generation.timeline(), self._num_tokens)


class RunningCompletion:
    """A `core.completion.OpenCompletion`. `groups` has one group per prompt. `on_close` is called once, at the end."""

    def __init__(
        self,
        groups: tuple["_Group", ...],
        request: CompletionRequest,
        generator: TokenGenerator,
        tokenizer: TextTokenizer,
        on_close: Callable[[], None],
    ) -> None:
        self._on_close: Callable[[], None] | None = on_close
        self._groups = groups
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
        return tuple(group.requests[0].token_ids for group in self._groups)

    def explanation(self) -> str:
        return self._generations[0].explanation()

    async def start(self) -> None:
        """Start the first choice of every prompt. Raises what `TokenGenerator.start` raises."""
        for position, group in enumerate(self._groups):
            self._leaders.append(self._choice(group, 0, position * len(group.requests)))
            await group.pause()

    def _choice(self, group: "_Group", position: int, index: int) -> ChoiceStream:
        generation = self._generator.start(group.requests[position], self._received_s, group.name_blocks, self._tenant)
        self._generations.append(generation)
        return ChoiceStream(index, generation, self._tokenizer, self._stop_strings, echo=self._echo)

    def __aiter__(self) -> AsyncIterator[TextDelta]:
        assert self._iterator is None, "the deltas are given once"
        single = len(self._groups) == 1 and len(self._groups[0].requests) == 1
        self._iterator = self._leaders[0].deltas() if single else self._merged()
        return self._iterator

    async def _merged(self) -> AsyncGenerator[TextDelta, None]:
        """A task puts its deltas into the queue, and the task itself when it is done."""
        for leader, group in zip(self._leaders, self._groups, strict=True):
            self._spawn(leader, group)
        while self._tasks:
            item = await self._queue.get()
            if isinstance(item, TextDelta):
                yield item
            else:
                self._tasks.discard(item)
                item.result()

    def _spawn(self, choice: ChoiceStream, led: "_Group | None" = None) -> None:
        task = asyncio.create_task(self._pump(choice, led))
        task.add_done_callback(self._queue.put_nowait)
        self._tasks.add(task)

    async def _pump(self, choice: ChoiceStream, led: "_Group | None") -> None:
        """The first choice starts the others of its prompt, `led`."""
        async for delta in choice.deltas():
            self._queue.put_nowait(delta)
            if led is not None:
                for position in range(1, len(led.requests)):
                    self._spawn(self._choice(led, position, choice.index + position))
                    await led.pause()
                led = None

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


@dataclass(frozen=True, slots=True)
class _Group:
    """The generations of one prompt, one for each choice."""

    requests: tuple[GenerationRequest, ...]
    name_blocks: BlockNamer

    async def pause(self) -> None:
        """After one of them has been started: a long prompt takes milliseconds to send."""
        if len(self.requests[0].token_ids) > _LONG_PROMPT_TOKENS:
            await asyncio.sleep(0)


class TextService:
    """A `core.completion.CompletionService` for one model. `random` gives the seeds of requests without one. The
    limits are those of `settings`.

    `on_refusal` functions get the error of every request that is refused before the `TokenGenerator` gets it.
    """

    def __init__(
        self,
        *,
        generator: TokenGenerator,
        tokenizer: TextTokenizer,
        model: str,
        random: Random,
        settings: RouterSection | None = None,
        on_refusal: Sequence[Callable[[TandemError], None]] = (),
        defaults: SamplingDefaults = _NO_DEFAULTS,
    ) -> None:
        self.defaults = defaults
        self._generator = generator
        self._tokenizer = tokenizer
        self._model = model
        self._random = random
        self._settings = settings or RouterSection()
        self._num_choices: Counter[str] = Counter()  # of each client
        self._on_refusal = tuple(on_refusal)

    def refused(self, error: TandemError) -> None:
        """Also for a request that an API refuses before `open`."""
        for notify in self._on_refusal:
            notify(error)

    def models(self) -> tuple[ServedModel, ...]:
        try:
            return (ServedModel(self._model, self._generator.max_model_len),)
        except UnavailableError:
            return (ServedModel(self._model, None),)

    async def open(self, request: CompletionRequest) -> RunningCompletion:
        """Raises InvalidRequestError, ContextLengthError, ModelNotFoundError, and what `TokenGenerator` raises."""
        try:
            self._check(request)
            slo = request.slo.resolve(self._settings.slo)
            close = self._admit(request)
            try:
                groups = await self._prepare(request, slo)
            except BaseException:
                close()
                raise
        except TandemError as error:
            self.refused(error)
            raise
        completion = RunningCompletion(groups, request, self._generator, self._tokenizer, close)
        try:
            await completion.start()
        except BaseException:
            await completion.aclose()
            raise
        return completion

    def _admit(self, request: CompletionRequest) -> Callable[[], None]:
        """Count the request's choices to its client, until the returned function is called. Raises OverloadedError."""
        client, num_choices = request.client, len(request.prompts) * request.n
        if client and self._num_choices[client] + num_choices > self._settings.max_client_choices:
            raise OverloadedError(
                f"At most {self._settings.max_client_choices} choices of one client may run at once; try again later.",
                reason="client-limit",
            )
        self._num_choices[client] += num_choices

        def close() -> None:
            self._num_choices[client] -= num_choices
            if not self._num_choices[client]:
                del self._num_choices[client]

        return close

    def _check(self, request: CompletionRequest) -> None:
        if request.model != self._model:
            raise ModelNotFoundError(
                f"The model '{clipped(request.model)}' does not exist; this server has '{self._model}'.", param="model"
            )
        check_request(request, self._tokenizer.vocab_size)

    async def _prepare(self, request: CompletionRequest, slo: RequestSlo) -> tuple[_Group, ...]:
        max_prompt_tokens = self._generator.max_model_len - 1
        prompts = [await self._token_ids(prompt, max_prompt_tokens) for prompt in request.prompts]
        limit = logprobs_limit(
            request.sampling,
            request.n,
            list(map(len, prompts)),
            request.max_tokens,
            self._settings.max_response_logprobs,
        )
        groups = []
        for position, token_ids in enumerate(prompts):
            requests = self._requests(request, token_ids, position, limit, slo)
            groups.append(_Group(requests, await self._generator.name_blocks(token_ids, requests[0].cache_salt)))
        return tuple(groups)

    def _cache_salt(self, request: CompletionRequest) -> str:
        """With API keys a tenant shares no cached prefix with others, unless the settings say so: the time to the first
        token would tell what they have sent."""
        if self._settings.api_keys is None or self._settings.share_prefixes:
            return request.cache_salt
        return f"{len(request.tenant)}:{request.tenant}{request.cache_salt}"

    async def _token_ids(self, prompt: Prompt, max_tokens: int) -> tuple[int, ...]:
        match prompt:
            case TextPrompt(text):
                return await self._tokenizer.encode(text, max_tokens)
            case ChatPrompt(messages):
                return await self._tokenizer.encode_chat(messages, max_tokens)
            case TokenPrompt(token_ids):
                return token_ids

    def _requests(
        self,
        request: CompletionRequest,
        token_ids: tuple[int, ...],
        position: int,
        logprobs_limit: int | None,
        slo: RequestSlo,
    ) -> tuple[GenerationRequest, ...]:
        """The generations of one prompt. The tokenizer decides which tokens end a sequence."""
        given = request.sampling
        seed = self._random.getrandbits(63) if request.seed is None else request.seed
        eos = () if given.ignore_eos else self._tokenizer.eos_token_ids
        stop_token_ids = tuple(sorted({*given.stop_token_ids, *eos}))
        max_tokens = output_limit(len(token_ids), request.max_tokens, self._generator.max_model_len)
        if logprobs_limit is not None:
            max_tokens = min(max_tokens, logprobs_limit)
        single = len(request.prompts) * request.n == 1
        return tuple(
            GenerationRequest(
                request_id=request.request_id if single else f"{request.request_id}-{position * request.n + choice}",
                token_ids=token_ids,
                sampling=replace(
                    given,
                    max_tokens=max_tokens,
                    stop_token_ids=stop_token_ids,
                    seed=derive_seed(seed, choice),
                    prompt_logprobs=given.prompt_logprobs if choice == 0 else None,
                ),
                cache_salt=self._cache_salt(request),
                deadline_s=request.deadline_s,
                slo=slo,
                trace=request.trace,
            )
            for choice in range(request.n)
        )
