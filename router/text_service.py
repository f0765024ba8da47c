"""The text side of a request: tokenize the prompts, start one generation per choice, turn tokens into deltas of text.

    CompletionRequest -> prompt ids -> one TokenGenerator.start per choice -> TextDelta, ..., Finish

Several choices of one prompt are several generations with seeds derived from one.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

from tandem.core.completion import (
    ChatPrompt,
    CompletionRequest,
    Prompt,
    SamplingDefaults,
    ServedModel,
    TextPrompt,
    TokenPrompt,
)
from tandem.core.errors import ModelNotFoundError, OverloadedError, TandemError, UnavailableError
from tandem.core.generation import TokenGenerator
from tandem.core.request import GenerationRequest
from tandem.core.request_slo import RequestSlo
from tandem.core.router_section import RouterSection
from tandem.router.limits import check_request, clipped, logprobs_limit, output_limit
from tandem.router.running_completion import PromptChoices, RunningCompletion
from tandem.router.tokenizer import TextTokenizer

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
                prompts = await self._prepare(request, slo)
            except BaseException:
                close()
                raise
        except TandemError as error:
            self.refused(error)
            raise
        completion = RunningCompletion(prompts, request, self._generator, self._tokenizer, close)
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

    async def _prepare(self, request: CompletionRequest, slo: RequestSlo) -> tuple[PromptChoices, ...]:
        max_prompt_tokens = self._generator.max_model_len - 1
        all_token_ids = [await self._token_ids(prompt, max_prompt_tokens) for prompt in request.prompts]
        limit = logprobs_limit(
            request.sampling,
            request.n,
            list(map(len, all_token_ids)),
            request.max_tokens,
            self._settings.max_response_logprobs,
        )
        prompts = []
        for position, token_ids in enumerate(all_token_ids):
            requests = self._requests(request, token_ids, position, limit, slo)
            prompts.append(
                PromptChoices(requests, await self._generator.name_blocks(token_ids, requests[0].cache_salt))
            )
        return tuple(prompts)

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
