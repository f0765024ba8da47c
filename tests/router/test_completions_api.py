"""/v1/completions over plain HTTP: prompts of all kinds, echo, legacy logprobs."""

import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from tandem.core.router_section import RouterSection
from tandem.router.tokenizer import TextTokenizer
from tests.router.front import MODEL, Front, serve_front

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATH = "/v1/completions"


async def ask(front: Front, **body: Any) -> dict[str, Any]:
    async with front.client() as client:
        response = await client.post(PATH, json={"model": MODEL} | body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def test_continues_text(front: Front) -> None:
    front.say("and more")
    body = await ask(front, prompt="some text ")
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [{"index": 0, "text": "and more", "logprobs": None, "finish_reason": "stop"}]
    request = front.generator.requests[0]
    assert request.token_ids == (0, *front.ids("some text ")), "a text to continue gets the beginning of sequence"
    assert request.sampling.max_tokens == 16


async def test_token_ids_are_taken_as_they_are(front: Front) -> None:
    front.say("yes")
    await ask(front, prompt=[5, 6, 7])
    assert front.generator.requests[0].token_ids == (5, 6, 7)


async def test_several_prompts_and_choices(front: Front) -> None:
    body = await ask(front, prompt=["aaa", "bbb"], n=2, max_tokens=4, temperature=0)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    texts = [choice["text"] for choice in body["choices"]]
    assert texts[0] == texts[1] == front.raw_tokenizer.decode((front.ids("aaa") * 4)[:4])
    assert texts[2] == texts[3] == front.raw_tokenizer.decode((front.ids("bbb") * 4)[:4])
    assert body["usage"]["prompt_tokens"] == len(front.ids("aaa")) + len(front.ids("bbb")) + 2
    body = await ask(front, prompt=[[5, 6], [7, 8]], max_tokens=2)
    assert [request.token_ids for request in front.generator.requests[-2:]] == [(5, 6), (7, 8)]


async def test_echo(front: Front) -> None:
    front.say("and more")
    assert (await ask(front, prompt="some text ", echo=True))["choices"][0]["text"] == "some text and more"
    ids = front.ids("some text ")
    assert (await ask(front, prompt=ids, echo=True))["choices"][0]["text"] == "some text and more"
    async with front.client() as client:
        response = await client.post(
            PATH, json={"model": MODEL, "prompt": "some text ", "echo": True, "stream": True, "n": 2}
        )
    chunks = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-2]]
    for choice in range(2):
        text = "".join(c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == choice)
        assert text == "some text and more"


async def test_logprobs(front: Front) -> None:
    front.say("and more")
    logprobs = (await ask(front, prompt="x", logprobs=2))["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == "and more"
    assert logprobs["text_offset"][:2] == [0, len(logprobs["tokens"][0])]
    assert set(logprobs["token_logprobs"]) == {-0.25}
    assert all(2 <= len(top) <= 3 for top in logprobs["top_logprobs"])


async def test_echo_with_logprobs_scores_the_prompt(front: Front) -> None:
    front.say("and more")
    body = await ask(front, prompt="some text", logprobs=0, echo=True, max_tokens=0, n=2)
    for choice in body["choices"]:
        assert choice["text"] == "some text"
        assert choice["logprobs"]["tokens"][0] == "<|endoftext|>"
        assert "".join(choice["logprobs"]["tokens"][1:]) == "some text"
        assert choice["logprobs"]["token_logprobs"] == [None] + [-0.5] * len(front.ids("some text"))
    assert body["usage"]["completion_tokens"] == 0
    wanted = [request.sampling.prompt_logprobs for request in front.generator.requests]
    assert wanted == [0, None], "one choice scores the prompt for all, the others use the cached prefix"


async def test_echo_alone_hides_the_output(front: Front) -> None:
    front.say("and more")
    body = {"prompt": "some text", "echo": True, "max_tokens": 0}
    whole = await ask(front, **body)
    assert [choice["text"] for choice in whole["choices"]] == ["some text"]
    request = front.generator.requests[0]
    assert (type(request.sampling.max_tokens), request.sampling.max_tokens) == (int, 1)
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with front.client() as client:
        response = await client.post(PATH, json={"model": MODEL, "stream": True, "stream_options": options} | body)
    chunks = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-2]]
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == "some text"
    assert {chunk["usage"]["completion_tokens"] for chunk in chunks} == {0}


async def test_stream(front: Front) -> None:
    front.say("and more, 你好")
    async with front.client() as client:
        response = await client.post(PATH, json={"model": MODEL, "prompt": "x", "stream": True, "max_tokens": 100})
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "and more, 你好"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({"max_tokens": 100, "logprobs": 4}, 500),
        ({"max_tokens": 20, "logprobs": 4, "n": 5}, 500),
        ({"max_tokens": 20, "logprobs": 4, "prompt": ["a"] * 5}, 500),
        ({"prompt": [5] * 99, "max_tokens": 1, "logprobs": 4, "echo": True}, 500),
        ({"prompt": [5] * 49, "max_tokens": 1, "logprobs": 4, "echo": True, "n": 2}, 500),
        ({"max_tokens": 250, "logprobs": 1}, 500),
        ({"max_tokens": 500, "logprobs": 0}, 500),
    ],
)
async def test_log_probabilities_of_a_response_are_bounded(
    tokenizer: TextTokenizer, raw_tokenizer: Tokenizer, changes: dict[str, Any], count: int
) -> None:
    """Prompts times n times tokens times alternatives."""
    body = {"model": MODEL, "prompt": "a"} | changes
    for limit in (count - 1, count):
        limited = serve_front(tokenizer, raw_tokenizer, RouterSection(max_response_logprobs=limit))
        async with limited as front, front.client() as client:
            response = await client.post(PATH, json=body)
            if limit < count:
                assert (response.status_code, response.json()["error"]["param"]) == (400, "logprobs")
                assert f"may have {count} log-probabilities, but at most {limit}" in response.text
            else:
                assert response.status_code == 200, response.text
            assert (await client.post(PATH, json=body | {"logprobs": None})).status_code == 200


async def test_many_log_probabilities_are_the_same_as_few(front: Front) -> None:
    """Threads write them, pieces carry them."""
    front.generator.tokens_per_step = 7
    request = {"prompt": [5, 6, 7] * 60, "echo": True, "logprobs": 20, "max_tokens": 300, "n": 2, "temperature": 0}
    whole = await ask(front, **request)
    async with front.client() as client:
        response = await client.post(PATH, json={"model": MODEL, "stream": True} | request)
    chunks = [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-2]]
    for choice in whole["choices"]:
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == choice["index"]]
        assert choice["text"] == "".join(part["text"] for part in parts)
        for name, values in choice["logprobs"].items():
            assert len(values) == 480
            assert values == [value for part in parts if part["logprobs"] for value in part["logprobs"][name]]
