"""/v1/chat/completions over plain HTTP: shapes, streaming, stop strings, logprobs, timelines."""

import json
from typing import Any

import httpx
import pytest

from tandem.core.errors import OverloadedError, UnavailableError
from tests.router.front import MODEL, Front

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATH = "/v1/chat/completions"
ASK: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}]}


async def ask(front: Front, **changes: Any) -> dict[str, Any]:
    async with front.client() as client:
        response = await client.post(PATH, json=ASK | changes)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def events_of(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def stream(front: Front, **changes: Any) -> list[Any]:
    async with front.client() as client:
        response = await client.post(PATH, json=ASK | {"stream": True} | changes)
    assert response.status_code == 200, response.text
    return events_of(response)


def streamed_text(events: list[Any], choice: int = 0) -> str:
    choices = [c for event in events for c in event.get("choices", ()) if c["index"] == choice]
    return "".join(c["delta"].get("content") or "" for c in choices)


async def test_answers_in_openais_shape(front: Front) -> None:
    front.say("hello there")
    body = await ask(front)
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == MODEL
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello there", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    num_prompt_tokens = len(front.generator.requests[0].token_ids)
    num_output_tokens = len(front.ids("hello there")) + 1  # the end-of-sequence token was drawn too
    assert body["usage"] == {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": num_prompt_tokens // 2},
    }


async def test_the_prompt_is_the_rendered_template(front: Front) -> None:
    front.say("yes")
    parts = [{"type": "text", "text": "Say"}, {"type": "text", "text": "hello."}]
    await ask(front, messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}])
    prompt = front.raw_tokenizer.decode(front.generator.requests[0].token_ids, skip_special_tokens=False)
    assert prompt == (
        "<|endoftext|><|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nSay\nhello.<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_parameters_reach_the_generator(front: Front) -> None:
    front.say("yes")
    await ask(
        front, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, presence_penalty=0.5, frequency_penalty=-0.5,
        repetition_penalty=1.1, seed=42, max_completion_tokens=9, stop_token_ids=[17], cache_salt="tenant",
    )  # fmt: skip
    request = front.generator.requests[0]
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 7, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.5, -0.5, 1.1)
    assert (sampling.seed, sampling.max_tokens) == (42, 9)
    assert sampling.stop_token_ids == (0, 2, 17), "the tokenizer's end-of-sequence tokens are stop tokens too"
    assert request.cache_salt == "tenant"


async def test_without_a_limit_the_answer_may_fill_the_context(front: Front) -> None:
    front.say("yes")
    await ask(front)
    request = front.generator.requests[0]
    assert request.max_total_tokens == front.generator.max_model_len


async def test_unseeded_requests_differ_and_top_p_zero_is_greedy(front: Front) -> None:
    front.say("yes")
    await ask(front, top_p=0)
    await ask(front)
    first, second = front.generator.requests
    assert first.sampling.seed != second.sampling.seed
    assert (first.sampling.top_p, first.sampling.top_k) == (1.0, 1)


async def test_stream_says_the_same(front: Front) -> None:
    front.say("Grüße aus Köln, 你好!")
    events = await stream(front)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert streamed_text(events) == "Grüße aus Köln, 你好!"
    assert events[-1]["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    assert len(events) > 5
    assert all(event["object"] == "chat.completion.chunk" and "usage" not in event for event in events)


async def test_stream_with_usage(front: Front) -> None:
    front.say("hello")
    events = await stream(front, stream_options={"include_usage": True})
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == len(front.ids("hello")) + 1


async def test_stream_with_usage_in_every_chunk(front: Front) -> None:
    front.say("hello")
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = await stream(front, n=2, stream_options=options)
    num_prompt_tokens = len(front.generator.requests[0].token_ids)
    usages = [event["usage"] for event in events]
    assert all(usage["prompt_tokens"] == num_prompt_tokens for usage in usages)
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts == sorted(counts)
    assert counts[-2] == counts[-1] == 2 * (len(front.ids("hello")) + 1)
    assert [usage["total_tokens"] for usage in usages] == [num_prompt_tokens + count for count in counts]
    events = await stream(front, stream_options={"continuous_usage_stats": True})
    assert all("usage" not in event for event in events), "only with include_usage"


async def test_stop_string_ends_the_answer_before_it_and_the_generation(front: Front) -> None:
    front.say("one, two, three, four", then_eos=False)
    body = await ask(front, stop=["three", "zzz"])
    assert body["choices"][0]["message"]["content"] == "one, two, "
    assert body["choices"][0]["finish_reason"] == "stop"
    generation = front.generator.generations[0]
    assert generation.was_cut_short
    assert generation.finish_reason is not None, "an answer that has all it wants is not a cancelled one"
    assert streamed_text(await stream(front, stop="three")) == "one, two, "


async def test_held_back_text_comes_in_the_end(front: Front) -> None:
    front.say("one, two, thr")
    assert (await ask(front, stop="three"))["choices"][0]["message"]["content"] == "one, two, thr"
    assert streamed_text(await stream(front, stop="three")) == "one, two, thr"


async def test_length_limit_and_ignored_end_of_sequence(front: Front) -> None:
    front.say("hello")
    body = await ask(front, ignore_eos=True, max_tokens=20)
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 20
    assert body["choices"][0]["message"]["content"].startswith("hello..")


async def test_n_choices_with_derived_seeds_and_one_prompt_count(front: Front) -> None:
    front.say("hello")
    body = await ask(front, n=3, seed=5)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert {choice["message"]["content"] for choice in body["choices"]} == {"hello"}
    requests = front.generator.requests
    assert requests[0].sampling.seed == 5
    assert len({request.sampling.seed for request in requests}) == 3
    assert len({request.request_id for request in requests}) == 3
    assert body["usage"]["prompt_tokens"] == len(requests[0].token_ids)
    assert body["usage"]["completion_tokens"] == 3 * (len(front.ids("hello")) + 1)
    events = await stream(front, n=3, seed=5)
    assert [streamed_text(events, choice) for choice in range(3)] == ["hello"] * 3


async def test_logprobs(front: Front) -> None:
    front.say("héllo")
    body = await ask(front, logprobs=True, top_logprobs=2)
    content = body["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == "héllo"
    assert all(entry["logprob"] == -0.25 and len(entry["top_logprobs"]) == 2 for entry in content)
    events = await stream(front, logprobs=True, top_logprobs=2)
    streamed = [entry for event in events for entry in (event["choices"][0]["logprobs"] or {}).get("content", ())]
    assert streamed == content


async def test_timeline_on_request(front: Front) -> None:
    front.say("hello")
    usage = (await ask(front, tandem={"timeline": True}))["usage"]
    timeline = usage["tandem"]["timeline"]
    assert next(iter(timeline["stages"])) == "received"
    assert abs(sum(timeline["parts"].values()) - timeline["total_s"]) < 1e-9
    assert 0 < timeline["ttft_s"] < timeline["total_s"]
    assert "tandem" not in (await ask(front))["usage"]
    async with front.client(headers={"x-tandem-timeline": "1"}) as client:
        events = events_of(await client.post(PATH, json=ASK | {"stream": True, "n": 2}))
    assert len(events[-1]["usage"]["tandem"]["timelines"]) == 2


async def test_who_is_refused_for_load_learns_when_to_come_again(front: Front) -> None:
    front.generator.refusal = OverloadedError("31 requests wait already", retry_after_s=4.2)
    async with front.client() as client:
        response = await client.post(PATH, json=ASK)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "5"
    assert response.json()["error"]["message"] == "31 requests wait already"


async def test_failure_before_the_first_token_has_a_status(front: Front) -> None:
    front.generator.failures = {0: UnavailableError("no decode worker is left")}
    async with front.client() as client:
        response = await client.post(PATH, json=ASK | {"stream": True})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"] == {
        "message": "no decode worker is left",
        "type": "server_error",
        "param": None,
        "code": "unavailable",
    }


async def test_failure_in_mid_stream_is_an_event(front: Front) -> None:
    front.say("hello there, all of you", then_eos=False)
    front.generator.failures = {3: UnavailableError("the decode worker is gone")}
    events = await stream(front)
    assert "finish_reason" in events[0]["choices"][0]
    assert events[-1]["error"]["code"] == "unavailable"
    assert not front.generator.running


async def test_request_id_is_echoed(front: Front) -> None:
    front.say("hello")
    async with front.client() as client:
        response = await client.post(PATH, json=ASK, headers={"x-request-id": "mine-1"})
        assert response.headers["x-request-id"] == "mine-1"
        assert front.generator.requests[-1].request_id != "mine-1"
        response = await client.post(PATH, json=ASK)
        assert response.headers["x-request-id"] == front.generator.requests[-1].request_id
