"""One text-level request and its choices, without any server."""

import asyncio
import itertools
from dataclasses import replace
from random import Random

import pytest

from tandem.core.completion import (
    ChatMessage,
    ChatPrompt,
    CompletionRequest,
    Prompt,
    TextDelta,
    TextPrompt,
    TokenPrompt,
)
from tandem.core.errors import InvalidRequestError, TandemError, UnavailableError
from tandem.core.request import FinishReason, SamplingParams
from tandem.router.text_service import TextService, derive_seed
from tandem.router.tokenizer import TextTokenizer
from tests.router.front import MODEL, Refusals, echo_script
from tests.router.text_fakes import ScriptedGenerator

GREEDY = SamplingParams(temperature=0.0)


def make_request(
    *prompts: Prompt, n: int = 1, max_tokens: int | None = 4, stop: tuple[str, ...] = ()
) -> CompletionRequest:
    return CompletionRequest(
        "r", MODEL, prompts or (TokenPrompt((5, 6, 7)),), received_s=0.0, sampling=GREEDY, n=n,
        max_tokens=max_tokens, stop=stop,
    )  # fmt: skip


@pytest.fixture
def generator() -> ScriptedGenerator:
    return ScriptedGenerator(echo_script)


@pytest.fixture
def refusals() -> Refusals:
    return Refusals()


@pytest.fixture
def service(generator: ScriptedGenerator, tokenizer: TextTokenizer, refusals: Refusals) -> TextService:
    return TextService(
        generator=generator, tokenizer=tokenizer, model=MODEL, random=Random(1), on_refusal=[refusals.refused]
    )


async def run(service: TextService, request: CompletionRequest) -> list[TextDelta]:
    async with await service.open(request) as completion:
        return [delta async for delta in completion]


@pytest.mark.parametrize("delay_s", [None, 0.0, 0.001])
@pytest.mark.parametrize("tokens_per_step", [1, 3])
async def test_every_choice_ends_once_and_last(
    service: TextService, generator: ScriptedGenerator, delay_s: float | None, tokens_per_step: int
) -> None:
    generator.delay_s = delay_s
    generator.tokens_per_step = tokens_per_step
    prompts = (TokenPrompt((5,)), TokenPrompt((6, 7)), TextPrompt("abc"))
    deltas = await run(service, make_request(*prompts, n=3, max_tokens=7))
    for choice in range(9):
        mine = [delta for delta in deltas if delta.choice == choice]
        assert [delta.finish is not None for delta in mine] == [False] * (len(mine) - 1) + [True]
        tokens = [token.token_id for delta in mine for token in delta.tokens]
        request = next(request for request in generator.requests if request.request_id == f"r-{choice}")
        assert tokens == list(itertools.islice(echo_script(request), 7))
        assert mine[-1].finish is not None
        assert mine[-1].finish.num_output_tokens == 7
    assert not generator.running


async def test_followers_wait_for_the_first_token(service: TextService, generator: ScriptedGenerator) -> None:
    """Then the prompt's KV is in the prefix cache."""
    async with await service.open(make_request(n=4)) as completion:
        assert len(generator.requests) == 1
        deltas = aiter(completion)
        await anext(deltas)
        await asyncio.sleep(0)
        assert len(generator.requests) == 4


async def test_one_failed_choice_fails_the_request_and_frees_the_others(
    service: TextService, generator: ScriptedGenerator
) -> None:
    generator.failures = {2: UnavailableError("gone")}
    with pytest.raises(UnavailableError, match="gone"):
        await run(service, make_request(n=3))
    assert not generator.running


async def test_a_prompt_that_cannot_start_frees_those_that_did(
    service: TextService, generator: ScriptedGenerator, refusals: Refusals
) -> None:
    await service.open(replace(make_request(), request_id="r-1"))
    with pytest.raises(TandemError, match="is running"):
        await service.open(make_request(TokenPrompt((5,)), TokenPrompt((6,))))
    assert "r-0" not in generator.running
    assert not refusals.errors


@pytest.mark.parametrize("n", [1, 3])
async def test_leaving_early_closes_everything(service: TextService, generator: ScriptedGenerator, n: int) -> None:
    async with await service.open(make_request(n=n, max_tokens=400)) as completion:
        async for _ in completion:
            if len(generator.running) == n:
                break
    assert not generator.running
    assert all(generation.was_cut_short for generation in generator.generations)


@pytest.mark.parametrize("n", [1, 3])
async def test_cancelling_the_task_closes_everything(
    service: TextService, generator: ScriptedGenerator, n: int
) -> None:
    generator.delay_s = 0.002
    task = asyncio.create_task(run(service, make_request(n=n, max_tokens=400)))
    async with asyncio.timeout(5):
        while len(generator.running) < n:  # noqa: ASYNC110 - seen from outside
            await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not generator.running


async def test_a_stop_string_in_the_last_held_character(
    service: TextService, generator: ScriptedGenerator, tokenizer: TextTokenizer
) -> None:
    """An incomplete character turns into a replacement character only at the end; that may complete a stop string."""
    (lead,) = [i for i in range(768) if tokenizer.spelling(i) == b"\xf0"]
    (letter,) = [i for i in range(768) if tokenizer.spelling(i) == b"a"]
    generator.script = lambda _: iter([letter, lead])
    deltas = await run(service, make_request(max_tokens=2, stop=("a\ufffd",)))
    assert "".join(delta.text for delta in deltas) == ""
    assert deltas[-1].finish is not None
    assert deltas[-1].finish.reason is FinishReason.STOP
    assert "".join(delta.text for delta in await run(service, make_request(max_tokens=2))) == "a\ufffd"


async def test_many_tokens_at_once_end_at_the_stop_string(
    service: TextService, generator: ScriptedGenerator, tokenizer: TextTokenizer
) -> None:
    ids = await tokenizer.encode("one, two, three")
    generator.script = lambda _: itertools.cycle(ids[1:])
    generator.tokens_per_step = 50
    deltas = await run(service, make_request(max_tokens=100, stop=("two",)))
    assert [delta.text for delta in deltas] == ["one, "]
    assert generator.generations[0].finish_reason is FinishReason.STOP


async def test_what_is_refused_before_the_generator_is_counted(service: TextService, refusals: Refusals) -> None:
    with pytest.raises(InvalidRequestError):
        await run(service, make_request(ChatPrompt((ChatMessage("pirate", "hi"),))))
    assert [error.code for error in refusals.errors] == ["invalid_request"]


def test_seeds() -> None:
    assert derive_seed(5, 0) == 5
    assert derive_seed(-1, 0) == (1 << 63) - 1
    seeds = {derive_seed(seed, choice) for seed in range(100) for choice in range(1, 17)}
    assert len(seeds) == 1600
    assert all(0 <= seed < 1 << 63 for seed in seeds)
