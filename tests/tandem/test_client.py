"""The clients against a router played by a script."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from tandem import AsyncClient, Client
from tandem.completion import ModelInfo, Usage
from tandem.core.errors import (
    ConfigError,
    DeadlineError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    TandemError,
    UnavailableError,
)
from tandem.core.request import FinishReason, TokenLogprob
from tandem.core.timeline import Stage
from tandem.rpc_errors import CODE_KEY, PARAM_KEY
from tandem.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from tests.absent import run_without


class ScriptedRouter(inference_pb2_grpc.InferenceServiceServicer):
    """Answers `hello world`; the prompt may ask it to fail or to hang instead."""

    def __init__(self) -> None:
        self.requests: list[inference_pb2.GenerateRequest] = []
        self.cancelled = threading.Event()

    def Generate(self, request: Any, context: Any) -> Iterator[inference_pb2.GenerateResponse]:
        self.requests.append(request)
        if request.text == "fail":
            context.set_trailing_metadata(((CODE_KEY, "model_not_found"), (PARAM_KEY, "model")))
            context.abort(grpc.StatusCode.NOT_FOUND, "there is no model 'x'; there is 'y'")
        if request.text == "full":
            context.set_trailing_metadata(((CODE_KEY, "overloaded"), (PARAM_KEY, "")))
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "queues are full")
        if request.text == "hang":
            context.add_callback(self.cancelled.set)
        if request.text == "short":
            yield inference_pb2.GenerateResponse(request_id="r", text="only")
            return
        yield inference_pb2.GenerateResponse(
            request_id="r",
            text="hello ",
            token_ids=[5],
            logprobs=[common_pb2.TokenLogprob(token_id=5, logprob=-0.5, top=[common_pb2.TopLogprob(token_id=6)])],
            prompt_logprobs=[common_pb2.TokenLogprob(token_id=-1), common_pb2.TokenLogprob(token_id=2, logprob=-1)],
        )
        if request.text == "hang":
            self.cancelled.wait(20)
            return
        yield inference_pb2.GenerateResponse(
            request_id="r",
            text="world",
            token_ids=[6, 7],
            finish_reason=common_pb2.FINISH_REASON_LENGTH,
            usage=common_pb2.Usage(prompt_tokens=4, completion_tokens=3, cached_tokens=2),
            timeline=common_pb2.Timeline(
                stamps=[
                    common_pb2.Timeline.Stamp(stage="received", at_s=0.0),
                    common_pb2.Timeline.Stamp(stage="first_token", at_s=0.5),
                    common_pb2.Timeline.Stamp(stage="stage_of_tomorrow", at_s=0.6),
                    common_pb2.Timeline.Stamp(stage="finished", at_s=1.5),
                ],
                num_attempts=2,
            ),
        )

    def ListModels(self, request: Any, context: Any) -> inference_pb2.ListModelsResponse:
        return inference_pb2.ListModelsResponse(models=[inference_pb2.Model(id="tiny", max_model_len=2048)])


@pytest.fixture
def router() -> Iterator[tuple[ScriptedRouter, str]]:
    servicer = ScriptedRouter()
    server = grpc.server(ThreadPoolExecutor(4))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    servicer.cancelled.set()
    server.stop(None).wait()


def test_generate_joins_the_stream(router: tuple[ScriptedRouter, str]) -> None:
    with Client(router[1]) as client:
        completion = client.generate(prompt="hi", max_tokens=3, temperature=0.0, stop="x", seed=7, logprobs=1)
    assert completion.text == "hello world"
    assert completion.token_ids == (5, 6, 7)
    assert completion.finish_reason is FinishReason.LENGTH
    assert completion.usage == Usage(4, 3, 2)
    assert completion.logprobs == (TokenLogprob(5, -0.5, ((6, 0.0),)),)
    assert completion.prompt_logprobs == (None, TokenLogprob(2, -1.0))
    assert completion.timeline.stamps == {Stage.RECEIVED: 0.0, Stage.FIRST_TOKEN: 0.5, Stage.FINISHED: 1.5}
    assert completion.timeline.tpot_s == 0.5
    assert completion.timeline.num_attempts == 2
    sent = router[0].requests[0]
    assert sent.text == "hi"
    assert sent.stop == ["x"]
    assert sent.sampling == common_pb2.SamplingParams(max_tokens=3, temperature=0.0, seed=7, logprobs=1)
    assert sent.sampling.HasField("temperature"), "greedy must be told from 'not set'"


def test_the_three_kinds_of_prompt(router: tuple[ScriptedRouter, str]) -> None:
    with Client(router[1]) as client:
        client.generate(messages=[{"role": "user", "content": "hi"}], cache_salt="s", request_id="id", model="m")
        client.generate(token_ids=[1, 2, 3], stop=["a", "b"])
    chat, tokens = router[0].requests
    assert [(m.role, m.content) for m in chat.chat.messages] == [("user", "hi")]
    assert (chat.cache_salt, chat.request_id, chat.model) == ("s", "id", "m")
    assert list(tokens.tokens.token_ids) == [1, 2, 3]
    assert tokens.stop == ["a", "b"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prompt": "a", "token_ids": [1]},
        {"prompt": 3},
        {"prompt": "\ud800"},
        {"prompt": "a", "max_tokens": "many"},
        {"token_ids": [1 << 40]},
        {"messages": [{"role": "user"}]},
    ],
)
def test_what_cannot_be_sent_is_refused_here(options: dict[str, Any]) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequestError):
        client.generate(**options)


def test_errors_come_back_as_they_were_raised(router: tuple[ScriptedRouter, str]) -> None:
    with Client(router[1]) as client:
        with pytest.raises(ModelNotFoundError, match="there is no model 'x'") as caught:
            client.generate(prompt="fail")
        assert caught.value.param == "model"
        with pytest.raises(OverloadedError) as full:
            next(client.stream(prompt="full"))
        assert full.value.retryable
        with pytest.raises(UnavailableError, match="before the answer was complete"):
            client.generate(prompt="short")


def test_nobody_listens() -> None:
    with Client("127.0.0.1:1") as client:
        with pytest.raises(UnavailableError, match="cannot be reached"):
            client.models()
        with pytest.raises(UnavailableError):
            client.generate(prompt="hi")


def test_deadline(router: tuple[ScriptedRouter, str]) -> None:
    with Client(router[1]) as client, pytest.raises(DeadlineError):
        client.generate(prompt="hang", timeout_s=0.3)


def test_closing_a_stream_cancels_it(router: tuple[ScriptedRouter, str]) -> None:
    with Client(router[1]) as client:
        with client.stream(prompt="hang") as stream:
            assert next(stream).text == "hello "
        assert router[0].cancelled.wait(5), "the router must see the cancellation"
        with pytest.raises(TandemError, match="cancelled"):
            next(stream)


def test_models(router: tuple[ScriptedRouter, str]) -> None:
    with Client(router[1]) as client:
        assert client.models() == (ModelInfo("tiny", 2048),)


async def test_async_client(router: tuple[ScriptedRouter, str]) -> None:
    async with AsyncClient(router[1]) as client:
        assert (await client.generate(prompt="hi")).text == "hello world"
        assert [delta.text async for delta in client.stream(prompt="hi")] == ["hello ", "world"]
        assert await client.models() == (ModelInfo("tiny", 2048),)
        with pytest.raises(ModelNotFoundError):
            await client.generate(prompt="fail")
        async with client.stream(prompt="hang") as stream:
            assert (await anext(stream)).text == "hello "
        assert router[0].cancelled.wait(5)


def test_the_client_needs_nothing_but_grpc_and_protobuf() -> None:
    """Nothing of any extra is installed after `pip install tandem-serve`."""
    extras = (
        "torch ray matplotlib scipy numpy pydantic pydantic_core yaml typer rich psutil packaging jinja2 markupsafe "
        "tokenizers safetensors starlette uvicorn httptools uvloop orjson prometheus_client tqdm"
    )
    ended = run_without(
        extras,
        """\
import asyncio
from tandem import AsyncClient, Client
from tandem.core.errors import InvalidRequestError, UnavailableError

with Client("127.0.0.1:1") as client:
    for options, error in (({}, InvalidRequestError), ({"prompt": "hi"}, UnavailableError)):
        try:
            client.generate(**options)
        except error:
            print("refused")

async def ask():
    async with AsyncClient("127.0.0.1:1") as client:
        try:
            await client.generate(prompt="hi")
        except UnavailableError:
            print("refused")

asyncio.run(ask())
""",
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["refused"] * 3


def test_importing_the_stubs_does_not_import_the_client() -> None:
    code = "import sys, tandem.v1.common_pb2; assert 'tandem.client' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_key_that_no_header_can_have_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match="characters that no header can have") as caught:
        Client("127.0.0.1:1", api_key="schl\u00fcssel")
    assert "schl" not in caught.value.message


def test_a_deadline_may_be_endless_and_is_a_number(router: tuple[ScriptedRouter, str]) -> None:
    with Client(router[1]) as client:
        assert client.generate(prompt="x", timeout_s=float("inf")).text == "hello world"
        with pytest.raises(InvalidRequestError, match="timeout_s must be a number of seconds"):
            client.generate(prompt="x", timeout_s=float("nan"))
