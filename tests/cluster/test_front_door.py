"""The public openai client, unchanged, against a whole cluster; and sampling that does not depend on company."""

import asyncio
from collections.abc import Iterator

import openai
import pytest

from tandem import AsyncClient
from tests.cluster.harness import Cluster

MODEL = "tiny-python"


@pytest.fixture
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_chat_streaming_and_not_give_the_same_text(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "write a function read_json that reads a JSON file"}]
    whole = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=40, seed=5)  # type: ignore[arg-type, call-overload]
    stream = client.chat.completions.create(  # type: ignore[call-overload]
        model=MODEL, messages=messages, max_tokens=40, seed=5, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.choices[0].finish_reason in ("stop", "length")


def test_choices_logprobs_stop_and_echo(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="def read(path):", max_tokens=8, n=3, temperature=1.2, seed=3, logprobs=2, echo=True
    )
    assert len({choice.text for choice in answer.choices}) > 1
    for choice in answer.choices:
        assert choice.text.startswith("def read(path):")
        assert choice.logprobs is not None
        assert choice.logprobs.token_logprobs is not None
        assert choice.logprobs.token_logprobs[0] is None
        assert "".join(choice.logprobs.tokens or []).removeprefix("<|begin|>") == choice.text
    again = client.completions.create(model=MODEL, prompt="def read(path):", max_tokens=30, temperature=0)
    stop = again.choices[0].text[5:8]
    stopped = client.completions.create(model=MODEL, prompt="def read(path):", max_tokens=30, temperature=0, stop=stop)
    assert stopped.choices[0].text == again.choices[0].text.split(stop)[0]
    assert stopped.choices[0].finish_reason == "stop"


def test_a_repeated_prompt_is_cached_for_its_tenant_alone(client: openai.OpenAI) -> None:
    prompt = "class Cache:\n    def get(self, key):\n" * 6

    def cached(salt: str) -> int:
        answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=2, extra_body={"cache_salt": salt})
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    assert cached("a") == 0
    assert cached("a") > 0
    # One whose prompt was computed twice, because of a failure on a busy machine, would find its own; hence three.
    assert 0 in [cached(tenant) for tenant in ("b", "c", "d")]


def test_bad_requests_are_explained(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="other", prompt="x")
    with pytest.raises(openai.BadRequestError, match="tokens"):
        client.completions.create(model=MODEL, prompt=[5] * 5000, max_tokens=1)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model=MODEL, prompt="x", temperature=-1)


async def test_a_seeded_request_draws_the_same_alone_and_in_a_crowd(cluster: Cluster) -> None:
    async with AsyncClient(cluster.grpc_address) as client:

        async def draw(seed: int) -> tuple[int, ...]:
            completion = await client.generate(
                prompt="import os\n", max_tokens=32, temperature=1.0, top_p=0.95, seed=seed, ignore_eos=True
            )
            return tuple(completion.token_ids)

        alone = [await draw(seed) for seed in range(4)]
        crowd = await asyncio.gather(*(draw(seed) for seed in range(32)))
    assert crowd[:4] == alone
    assert len(set(crowd)) > 16
