"""The public `openai` client, unchanged."""

import openai
import pytest

from tandem.core.errors import OverloadedError, UnavailableError
from tests.router.front import MODEL, Front

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_chat(front: Front) -> None:
    front.say("hello there")
    async with front.openai() as client:
        answer = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}],
            temperature=0,
            max_completion_tokens=50,
            logprobs=True,
            top_logprobs=1,
            n=2,
            user="me",
            extra_body={"top_k": 5, "tandem": {"timeline": True}},
        )
    assert [choice.message.content for choice in answer.choices] == ["hello there"] * 2
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert "".join(entry.token for entry in content) == "hello there"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens
    assert answer.usage.model_extra is not None
    assert answer.usage.model_extra["tandem"]["timeline"]["ttft_s"] > 0


async def test_chat_stream_with_usage(front: Front) -> None:
    front.say("hello there, 你好")
    text, usage = "", None
    async with front.openai() as client:
        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            stream_options={"include_usage": True},
            stop=["never said"],
            seed=3,
        )
        async for chunk in stream:
            usage = chunk.usage or usage
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
    assert text == "hello there, 你好"
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


async def test_leaving_a_stream_ends_its_generation(front: Front) -> None:
    front.say("hello there", then_eos=False)
    front.generator.delay_s = 0.005
    async with front.openai() as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hi"}], stream=True
        )
        async for _ in stream:
            break
        await stream.close()
        await front.wait_until_idle()


async def test_completions(front: Front) -> None:
    front.say("and more")
    async with front.openai() as client:
        answer = await client.completions.create(model=MODEL, prompt=["some ", "text "], echo=True, logprobs=1)
        assert [choice.text for choice in answer.choices] == ["some and more", "text and more"]
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        assert logprobs.token_logprobs[0] is None
        stream = await client.completions.create(model=MODEL, prompt=front.ids("some "), stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "and more"


async def test_models(front: Front) -> None:
    async with front.openai() as client:
        assert [model.id async for model in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).owned_by == "tandem"


async def test_errors_are_the_clients_own(front: Front) -> None:
    async with front.openai() as client:
        with pytest.raises(openai.NotFoundError) as not_found:
            await client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "hi"}])
        assert not_found.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            await client.completions.create(model=MODEL, prompt="hi", temperature=3)
        assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
        with pytest.raises(openai.BadRequestError) as long:
            await client.completions.create(model=MODEL, prompt=[5] * 600)
        assert long.value.code == "context_length_exceeded"
        front.generator.refusal = OverloadedError("the queue is full")
        with pytest.raises(openai.RateLimitError):
            await client.completions.create(model=MODEL, prompt="hi")
        front.generator.refusal = None
        front.generator.failures = {2: UnavailableError("the decode worker is gone")}
        with pytest.raises(openai.APIError, match="the decode worker is gone"):
            async for _ in await client.completions.create(model=MODEL, prompt="hi", stream=True):
                pass
