"""Whatever is wrong with a request is said in OpenAI's error shape, and nothing is left running."""

import asyncio
import json
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tandem.core.errors import DuplicateRequestError, OverloadedError
from tandem.core.router_section import RouterSection
from tandem.router.openai.openapi import openapi_document
from tandem.router.tokenizer import TextTokenizer
from tests.router.front import MODEL, Front, serve_front

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
JSON = {"content-type": "application/json"}


def check_error(response: httpx.Response, status: int, param: str | None, code: str | None, words: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code), error
    assert words in error["message"], error


# what is added to a right chat request -> the field named, and words of the sentence
WRONG_CHAT: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": "hot"}, "temperature", "expected a valid number, but got a string"),
    ({"temperature": 2.5}, "temperature", "at most 2"),
    ({"temperature": -0.1}, "temperature", "at least 0"),
    ({"temperature": True}, "temperature", "expected a valid number, but got a boolean"),
    ({"top_p": 1.5}, "top_p", "at most 1"),
    ({"top_k": -2}, "top_k", "at least 0"),
    ({"top_k": 1.0}, "top_k", "expected a valid integer"),
    ({"min_p": 2}, "min_p", "at most 1"),
    ({"presence_penalty": 3}, "presence_penalty", "at most 2"),
    ({"frequency_penalty": -3}, "frequency_penalty", "at least -2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "above 0"),
    ({"n": 0}, "n", "at least 1"),
    ({"n": 17}, "n", "at most 16"),
    ({"n": 217_310_311}, "n", "at most 16"),
    ({"seed": 1 << 63}, "seed", "at most 9223372036854775807, but it is 9223372036854775808"),
    ({"tandem": 5}, "tandem", "expected an object, but got an integer"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_tokens": -1}, "max_tokens", "at least 1 and at most 2147483647, but it is -1"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "not both"),
    ({"stop": ["x" * 1025]}, "stop", "1 to 1024 characters"),
    ({"stop": ["x"] * 17}, "stop", "at most 16"),
    ({"stop": ["x"] * 2000}, "stop", "at most 16"),
    ({"stop": [1]}, "stop", "a string or a list of strings"),
    ({"stop_token_ids": [768]}, "stop_token_ids", "token id 768"),
    ({"stop_token_ids": ["a"] * 257}, "stop_token_ids", "at most 256"),
    ({"stop_token_ids": [0] * 257}, "stop_token_ids", "at most 256"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20"),
    ({"logprobs": 3}, "logprobs", "expected a valid boolean, but got an integer"),
    ({"top_logprobs": 3}, "top_logprobs", "needs 'logprobs'"),
    ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage", "boolean"),
    ({"stream_options": {str(number): number for number in range(65)}}, "stream_options", "more than 64 fields"),
    ({"stream_options": {"what": 1}}, "stream_options.what", "Unrecognized"),
    ({"max_token": 5}, "max_token", "Unrecognized request argument supplied: max_token"),
    ({"cache_salt": "x" * 257}, "cache_salt", "at most 256 characters"),
    ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
    ({"audio": {"voice": "x"}}, "audio", "not supported"),
    ({"best_of": 3}, "best_of", "not supported"),
    ({"messages": []}, "messages", "at least one message"),
    ({"messages": MESSAGES * 4097}, "messages", "at most 4096 items, but it has 4097"),
    ({"messages": [5] * 4097}, "messages", "at most 4096 items, but it has 4097"),
    ({"messages": "hi"}, "messages", "expected a valid list, but got a string"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "Missing"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "'user'"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "a string or a list of text parts"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "'image_url'"),
    ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content", '{"type": "text", "text":'),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0]", "'tool_calls' is not supported"),
    ({"min_tokens": 1}, "min_tokens", "not supported"),
    ({"skip_special_tokens": False}, "skip_special_tokens", "does not support 'skip_special_tokens' being false"),
    ({"model": 5}, "model", "expected a valid string, but got an integer"),
]

WRONG_TEXT: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": []}, "prompt", "list of token ids"),
    ({"prompt": [1, "a"]}, "prompt", "list of token ids"),
    ({"prompt": [True]}, "prompt", "list of token ids"),
    ({"prompt": [[]]}, "prompt", "list of token ids"),
    ({"prompt": [5, 768]}, "prompt", "token id 768 is not in the model's vocabulary of 768"),
    ({"prompt": [-1]}, "prompt", "token id -1"),
    ({"prompt": None}, "prompt", "must be a string"),
    ({"prompt": ["a"] * 129}, "prompt", "128"),
    ({"prompt": [5.5] * 129}, "prompt", "128"),
    ({"prompt": ["a"] * 65, "n": 2}, "prompt", "128"),
    ({"max_tokens": 0}, "max_tokens", "'echo'"),
    ({"max_tokens": -1}, "max_tokens", "but it is -1"),
    ({"logprobs": 21}, "logprobs", "at most 20"),
    ({"logprobs": True}, "logprobs", "integer"),
    ({"suffix": "end"}, "suffix", "not supported"),
]


async def test_wrong_fields_are_named(front: Front) -> None:
    async with front.client() as client:
        for path, right, cases in (
            (CHAT, {"model": MODEL, "messages": MESSAGES}, WRONG_CHAT),
            (TEXT, {"model": MODEL, "prompt": "hi"}, WRONG_TEXT),
        ):
            for changes, param, words in cases:
                check_error(await client.post(path, json=right | changes), 400, param, "invalid_request", words)
    assert len(front.refusals.errors) == len(WRONG_CHAT) + len(WRONG_TEXT)
    assert not front.generator.requests


async def test_harmless_fields_are_ignored(front: Front) -> None:
    front.say("yes")
    harmless: dict[str, Any] = {
        "user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "parallel_tool_calls": True,
        "tools": None, "response_format": {"type": "text"}, "logit_bias": {}, "n": None, "stop": None, "top_k": -1,
        "best_of": 1, "stream_options": None, "seed": None, "temperature": 1, "logprobs": None, "min_tokens": 0,
        "guided_json": None, "chat_template_kwargs": {}, "use_beam_search": False, "skip_special_tokens": True,
        "max_tokens": 5, "max_completion_tokens": 5, "tool_choice": "", "audio": False, "tandem": {"timeline": None},
    }  # fmt: skip
    async with front.client() as client:
        response = await client.post(CHAT, json={"model": MODEL, "messages": MESSAGES} | harmless)
        assert response.status_code == 200, response.text
        for stop in ("", [""], ["", "zzz"]):
            response = await client.post(CHAT, json={"model": MODEL, "messages": MESSAGES, "stop": stop})
            assert response.status_code == 200, response.text
        response = await client.post(
            TEXT, json={"model": MODEL, "prompt": "x", "max_completion_tokens": 3, "logprobs": False, "echo": None}
        )
    assert response.status_code == 200, response.text
    assert front.generator.requests[-1].sampling.max_tokens == 3


async def test_a_message_of_a_response_may_be_sent_back(front: Front) -> None:
    """Client libraries give back every field they know, most of them null, and those of other vendors."""
    front.say("yes")
    returned: list[dict[str, Any]] = [
        {"role": "assistant", "content": "hello", "refusal": None, "annotations": [], "tool_calls": None, "audio": None,
         "function_call": None, "parsed": None, "reasoning_content": "why", "vendor": {"a": 1}},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant"},
    ]  # fmt: skip
    async with front.client() as client:
        for message in returned:
            response = await client.post(CHAT, json={"model": MODEL, "messages": [*MESSAGES, message, *MESSAGES]})
            assert response.status_code == 200, response.text
    prompt = front.raw_tokenizer.decode(front.generator.requests[-1].token_ids, skip_special_tokens=False)
    assert "<|im_start|>assistant\n<|im_end|>" in prompt


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"model": "x",\n  tru}', "line 2, column 3"),
        (b'{"model": NaN}', "not valid JSON"),
        (b'{"model": Infinity}', "not valid JSON"),
        (b'{"temperature": 1e999}', "not valid JSON"),
        (b'{"model": "\xff"}', "not valid UTF-8 (byte 11)"),
        (b'{"model": "\\ud800"}', "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[1]", "must be a JSON object, but it is a list"),
        (b"null", "must be a JSON object, but it is null"),
        (b"[" * 5000, "not valid JSON"),
    ],
)
async def test_malformed_bodies(front: Front, body: bytes, words: str) -> None:
    async with front.client(headers=JSON) as client:
        check_error(await client.post(CHAT, content=body), 400, None, "invalid_request", words)


async def test_only_plain_json_bodies(front: Front) -> None:
    front.say("yes")
    body = json.dumps({"model": MODEL, "messages": MESSAGES}).encode()
    async with front.client() as client:
        for headers, words in (
            ({"content-type": "text/plain"}, "must be application/json, but it is 'text/plain'"),
            ({"content-type": "application/x-www-form-urlencoded"}, "application/json"),
            ({}, "must be application/json, but it is not given"),
            (JSON | {"content-encoding": "gzip"}, "no compressed body, but the content-encoding is 'gzip'"),
        ):
            response = await client.post(CHAT, content=body, headers=headers)
            check_error(response, 415, None, "unsupported_media_type", words)
        assert [error.code for error in front.refusals.errors] == ["unsupported_media_type"] * 4
        response = await client.post(CHAT, content=body, headers={"content-type": "Application/JSON; charset=utf-8"})
        assert response.status_code == 200
        response = await client.post(CHAT, content=b"\xef\xbb\xbf" + body, headers=JSON)
        assert response.status_code == 200, "a byte order mark is no error"


async def test_head_and_trailing_slashes(front: Front) -> None:
    front.say("yes")
    async with front.client() as client:
        for path in ("/health", "/metrics", "/v1/models", "/v1/models/tiny"):
            whole = await client.get(path)
            response = await client.head(path)
            assert (response.status_code, response.content) == (200, b"")
            assert response.headers["content-length"] == str(len(whole.content))
            assert (await client.get(f"{path}/")).content == whole.content
        assert (await client.head(CHAT)).status_code == 405
        assert (await client.head("/v1/nothing")).status_code == 404
        response = await client.post(f"{CHAT}/", json={"model": MODEL, "messages": MESSAGES})
        assert response.status_code == 200


async def test_unknown_models_paths_and_methods(front: Front) -> None:
    async with front.client() as client:
        response = await client.post(CHAT, json={"model": "gpt", "messages": MESSAGES})
        check_error(response, 404, "model", "model_not_found", "'gpt' does not exist; this server has 'tiny'")
        check_error(await client.post(CHAT, json={"messages": MESSAGES}), 400, "model", "invalid_request", "Missing")
        check_error(await client.get("/v1/models/gpt"), 404, "model", "model_not_found", "gpt")
        check_error(await client.get("/v1/nothing"), 404, None, "not_found", CHAT)
        response = await client.get(CHAT)
        check_error(response, 405, None, "method_not_allowed", "takes POST, not GET")
        assert response.headers["allow"] == "POST"
        response = await client.delete("/v1/models/tiny")
        check_error(response, 405, None, "method_not_allowed", "takes GET")
        assert response.headers["allow"] == "GET, HEAD"


async def test_a_clients_words_are_not_repeated_at_length(front: Front) -> None:
    async with front.client() as client:
        for body in (
            {"model": "x" * 100_000, "messages": MESSAGES},
            {"model": MODEL, "messages": MESSAGES, "y" * 100_000: 1},
            {"model": MODEL, "messages": [{"role": "user", "content": [{"type": "z" * 100_000}]}]},
        ):
            response = await client.post(CHAT, json=body)
            assert response.status_code in (400, 404)
            assert len(response.content) < 1000


async def test_models_health_and_metrics(front: Front) -> None:
    async with front.client() as client:
        model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "tandem", "max_model_len": 512}
        assert (await client.get("/v1/models")).json() == {"object": "list", "data": [model]}
        assert (await client.get("/v1/models/tiny")).json() == model
        assert (await client.get("/health")).json() == {"status": "ok"}
        metrics = await client.get("/metrics")
        assert metrics.text == "refused_total 0\n"
        assert metrics.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        front.generator.max_model_len_or_none = None
        assert [(await client.get(path)).status_code for path in ("/health", "/readyz", "/livez")] == [503, 503, 200]
        check_error(
            await client.post(TEXT, json={"model": MODEL, "prompt": "hi"}),
            503,
            None,
            "unavailable",
            "no worker is ready",
        )


async def test_too_long_prompts_say_both_numbers(front: Front) -> None:
    async with front.client() as client:
        response = await client.post(TEXT, json={"model": MODEL, "prompt": [5] * 512})
        check_error(response, 400, "prompt", "context_length_exceeded", "has 512 tokens, but at most 511 fit")
        response = await client.post(TEXT, json={"model": MODEL, "prompt": [5] * 500, "max_tokens": 13})
        check_error(response, 400, "max_tokens", "context_length_exceeded", "requested 513 (500 in the prompt, 13")
        response = await client.post(TEXT, json={"model": MODEL, "prompt": [5] * 500, "max_tokens": 12})
        assert response.status_code == 200


async def test_refusals_of_the_generator_keep_their_status(front: Front) -> None:
    async with front.client() as client:
        for error, status in (
            (OverloadedError("the queue is full"), 429),
            (DuplicateRequestError("a request with that id is running"), 409),
        ):
            front.generator.refusal = error
            response = await client.post(CHAT, json={"model": MODEL, "messages": MESSAGES, "stream": True, "n": 2})
            check_error(response, status, None, error.code, error.message)
    assert not front.refusals.errors, "the generator counts its own refusals"


def broken_script(_: object) -> list[int]:
    raise ZeroDivisionError("a fault of ours")


async def test_a_fault_of_ours_is_not_told_to_the_client(
    front: Front, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    front.generator.script = broken_script
    async with front.client() as client:
        response = await client.post(CHAT, json={"model": MODEL, "messages": MESSAGES})
        assert response.status_code == 500
        assert response.json()["error"]["message"] == "The server failed to answer; its log has the reason."
        front.say("yes")
        assert (await client.post(CHAT, json={"model": MODEL, "messages": MESSAGES})).status_code == 200
        with monkeypatch.context() as patch:
            patch.setattr(type(front.generator), "max_model_len", property(broken_script))
            check_error(await client.get("/health"), 500, None, None, "its log has the reason")
        assert (await client.get("/health")).status_code == 200
    assert [record.exc_info is not None for record in caplog.records if record.levelname == "ERROR"] == [True, True]


async def test_a_client_that_leaves_while_it_sends_is_no_error(front: Front, caplog: pytest.LogCaptureFixture) -> None:
    _, port = front.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection("127.0.0.1", int(port))
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n"
    with caplog.at_level("INFO"):
        writer.write(head.encode() + b"{")
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()
        async with asyncio.timeout(5):
            while "the client disconnected" not in caplog.text:  # noqa: ASYNC110 - seen from outside
                await asyncio.sleep(0.005)
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


async def test_oversize_bodies_are_refused_while_they_come(tokenizer: TextTokenizer, raw_tokenizer: Tokenizer) -> None:
    limited = serve_front(tokenizer, raw_tokenizer, RouterSection(max_body=1000))
    async with limited as front, front.client(headers=JSON) as client:
        check_error(await client.post(CHAT, content=b"x" * 1001), 413, None, "payload_too_large", "1000 bytes")
        sent = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal sent
            while sent < 1 << 17:
                sent += 4096
                yield b"x" * 4096
                await asyncio.sleep(0)

        check_error(await client.post(CHAT, content=endless()), 413, None, "payload_too_large", "1000 bytes")
        assert (await client.post(CHAT, content=b"{}")).status_code == 400, "the next request works"


async def open_raw(front: Front, body: dict[str, Any]) -> asyncio.StreamWriter:
    """Send a request and leave its answer unread."""
    _, port = front.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection("127.0.0.1", int(port))
    content = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: [::1]\r\ncontent-type: application/json\r\n"
    head += f"content-length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    await writer.drain()
    return writer


@pytest.mark.parametrize("changes", [{}, {"stream": True}, {"n": 3}, {"n": 3, "stream": True}, {"max_tokens": 400}])
async def test_a_client_that_goes_away_frees_everything(front: Front, changes: dict[str, Any]) -> None:
    front.generator.delay_s = 0.005
    writers = [await open_raw(front, {"model": MODEL, "messages": MESSAGES} | changes) for _ in range(4)]
    async with asyncio.timeout(10):
        while len(front.generator.running) < 4 * changes.get("n", 1):  # noqa: ASYNC110 - seen from outside
            await asyncio.sleep(0.005)
    for writer in writers:
        writer.close()
    await front.wait_until_idle()
    assert all(generation.is_closed for generation in front.generator.generations)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 1 << 70) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PLAUSIBLE = st.fixed_dictionaries(
    {},
    optional={
        "model": st.just(MODEL) | JSON_VALUES,
        "messages": st.lists(
            st.fixed_dictionaries(
                {"role": st.sampled_from(["user", "system", "assistant", "tool"]), "content": st.text(max_size=20)}
            ),
            max_size=3,
        )
        | JSON_VALUES,
        "prompt": st.text(max_size=20) | st.lists(st.integers(0, 800), max_size=4) | JSON_VALUES,
        "max_tokens": st.integers(1, 20) | JSON_VALUES,
        "temperature": st.floats(0, 2) | JSON_VALUES,
        "top_p": st.floats(0, 1) | JSON_VALUES,
        "n": st.integers(1, 3) | JSON_VALUES,
        "stop": st.lists(st.text(min_size=1, max_size=3), max_size=3) | JSON_VALUES,
        "stream": st.booleans(),
        "logprobs": st.booleans() | st.integers(0, 5),
        "echo": st.booleans() | JSON_VALUES,
        "tandem": st.just({"timeline": True}) | JSON_VALUES,
        "seed": st.integers() | JSON_VALUES,
        "stop_token_ids": st.lists(st.integers(0, 800), max_size=3) | JSON_VALUES,
    },
)
BODIES = st.one_of(
    PLAUSIBLE.map(lambda body: {"model": MODEL, "messages": MESSAGES, "max_tokens": 5} | body),
    PLAUSIBLE.map(lambda body: {"model": MODEL, "prompt": "hi"} | body),
    JSON_VALUES,
).map(lambda value: json.dumps(value).encode())


async def test_random_bodies_never_break_it(tokenizer: TextTokenizer, raw_tokenizer: Tokenizer) -> None:
    loop = asyncio.get_running_loop()
    async with serve_front(tokenizer, raw_tokenizer) as front, front.client(headers=JSON) as client:

        async def send(path: str, body: bytes) -> httpx.Response:
            return await client.post(path, content=body)

        @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
        @given(path=st.sampled_from([CHAT, TEXT]), body=BODIES | st.binary(max_size=30))
        def check(path: str, body: bytes) -> None:
            response = asyncio.run_coroutine_threadsafe(send(path, body), loop).result(10)
            assert response.status_code in (200, 400, 404), (body, response.text)
            if response.status_code != 200:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}
            elif response.headers["content-type"].startswith("text/event-stream"):
                assert response.text.endswith("data: [DONE]\n\n")
                assert '"error"' not in response.text
            else:
                assert all(choice["finish_reason"] for choice in response.json()["choices"])

        await asyncio.to_thread(check)
        assert not front.generator.running


@pytest.mark.parametrize(("path", "of"), [(CHAT, "ChatRequest"), (TEXT, "CompletionRequest")])
async def test_no_number_makes_the_router_allocate(path: str, of: str, front: Front) -> None:
    """One request with n = 217,310,311 took 20 GiB before the number was refused."""
    fields = openapi_document()["components"]["schemas"][of]["properties"]
    numbers = [name for name, schema in fields.items() if {"integer", "number"} & set(schema.get("type", ()))]
    assert {"n", "max_tokens", "seed", "top_k"} <= set(numbers)
    right = {"model": MODEL, "messages": MESSAGES} if path == CHAT else {"model": MODEL, "prompt": "a"}
    async with front.client() as client:
        tracemalloc.start()
        try:
            for name in numbers:
                await client.post(path, json=right | {"max_tokens": 1} | {name: 1 << 22})
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak_bytes < 16 << 20
