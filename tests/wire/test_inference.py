"""InferenceService over a real channel, in front of the text side on a scripted generator."""

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import grpc
import pytest

from tandem import AsyncClient
from tandem.completion import Delta, ModelInfo
from tandem.core.clock import SystemClock
from tandem.core.errors import (
    ContextLengthError,
    DeadlineError,
    DuplicateRequestError,
    InternalError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    TandemError,
    UnavailableError,
)
from tandem.core.request import FinishReason
from tandem.core.router_section import RouterSection
from tandem.router.http_body import BodyBudget
from tandem.router.text_service import TextService
from tandem.router.tokenizer import TextTokenizer
from tandem.v1 import inference_pb2, inference_pb2_grpc
from tandem.wire.answer_errors import AnswerErrors, RequestReads
from tandem.wire.inference import InferenceServicer, client_of
from tandem.wire.server import bind, build_public_server
from tests.router.front import MODEL, echo_script, write_checkpoint
from tests.router.text_fakes import ScriptedGenerator

CHAT = [{"role": "user", "content": "hi"}]


@dataclass
class Service:
    generator: ScriptedGenerator
    client: AsyncClient
    address: str

    async def all(self, **options: Any) -> list[Delta]:
        return [delta async for delta in self.client.stream(**options)]

    async def wait_until_idle(self) -> None:
        async with asyncio.timeout(5.0):
            while self.generator.running:  # noqa: ASYNC110 - seen from outside, as a client would
                await asyncio.sleep(0.005)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder: Path = write_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    return TextTokenizer.load(folder, clock=SystemClock(), executor=ThreadPoolExecutor(1))


@asynccontextmanager
async def serving(tokenizer: TextTokenizer, **options: Any) -> AsyncIterator[Service]:
    generator = ScriptedGenerator(echo_script)
    text = TextService(
        generator=generator,
        tokenizer=tokenizer,
        model=MODEL,
        random=Random(1),
        settings=RouterSection(max_response_logprobs=1 << 30),
    )
    server, _ = build_public_server(8 << 20)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(
        InferenceServicer(text, SystemClock(), Random(2), 0.5, **options), server
    )
    address = bind(server, "127.0.0.1:0")
    await server.start()
    async with AsyncClient(address) as client:
        yield Service(generator, client, address)
    await server.stop(0.1)


@pytest.fixture
async def service(tokenizer: TextTokenizer) -> AsyncIterator[Service]:
    async with serving(tokenizer) as service:
        yield service


async def test_tokens_in_tokens_out(service: Service) -> None:
    deltas = await service.all(token_ids=[5, 6, 7], max_tokens=4, temperature=0, seed=9, request_id="mine")
    assert [token_id for delta in deltas for token_id in delta.token_ids] == [5, 6, 7, 5]
    assert {delta.request_id for delta in deltas} == {"mine"}
    assert [delta.finish_reason for delta in deltas] == [None] * 4 + [FinishReason.LENGTH]
    last = deltas[-1]
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.cached_tokens) == (3, 4, 1)
    assert last.timeline is not None
    assert sum(last.timeline.parts().values()) == pytest.approx(last.timeline.total_s)
    assert service.generator.requests[0].sampling.seed == 9


async def test_requests_hold_no_more_memory_than_there_is(tokenizer: TextTokenizer) -> None:
    budget = BodyBudget(500)
    async with serving(tokenizer, hold_bytes=budget.hold) as service:
        service.generator.delay_s = 0.1
        async with service.client.stream(prompt="a" * 300, max_tokens=100) as stream:
            await anext(stream)
            with pytest.raises(OverloadedError, match="the 500 bytes of bodies"):
                await service.client.generate(prompt="b" * 300)
        await service.wait_until_idle()
        async with asyncio.timeout(5.0):
            while budget.num_bytes:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        await service.client.generate(prompt="b" * 300, max_tokens=1)


async def test_text_and_chat(service: Service, tokenizer: TextTokenizer) -> None:
    answer = await service.client.generate(prompt="abc", max_tokens=6, model=MODEL)
    prompt = await tokenizer.encode("abc")
    assert service.generator.requests[0].token_ids == prompt
    assert answer.text == tokenizer.decode([*itertools.islice(itertools.cycle(prompt[1:]), 6)])
    await service.client.generate(messages=CHAT)
    request = service.generator.requests[1]
    assert tokenizer.decode(request.token_ids) == "user\nhi\nassistant\n"
    assert request.max_total_tokens == service.generator.max_model_len, "no limit: as much as fits"
    assert len({request.request_id for request in service.generator.requests}) == 2


async def test_a_stop_token_is_reported_and_no_text(service: Service) -> None:
    service.generator.script = lambda _: iter([5, 2])
    deltas = await service.all(token_ids=[5], logprobs=1, prompt_logprobs=0)
    assert [delta.token_ids for delta in deltas] == [(5,), (2,), ()]
    assert "".join(delta.text for delta in deltas[1:]) == ""
    assert [logprob.token_id for delta in deltas for logprob in delta.logprobs] == [5, 2]
    assert deltas[0].prompt_logprobs == (None,)
    assert deltas[-1].finish_reason is FinishReason.STOP


async def test_stop_strings(service: Service, tokenizer: TextTokenizer) -> None:
    ids = await tokenizer.encode("one, two, three")
    service.generator.script = lambda _: itertools.cycle(ids[1:])
    answer = await service.client.generate(token_ids=[5], stop=[" thr", "zzz"])
    assert answer.text == "one, two,"
    assert service.generator.generations[0].was_cut_short


@pytest.mark.parametrize(
    ("options", "error", "param"),
    [
        ({"prompt": "x", "model": "gpt"}, ModelNotFoundError, "model"),
        ({"prompt": "x", "model": "x" * 100_000}, ModelNotFoundError, "model"),
        ({"token_ids": []}, InvalidRequestError, "prompt"),
        ({"token_ids": [999]}, InvalidRequestError, "prompt"),
        ({"messages": []}, InvalidRequestError, "messages"),
        ({"messages": [{"role": "pirate", "content": "x"}]}, InvalidRequestError, "messages"),
        ({"prompt": "x", "temperature": float("nan")}, InvalidRequestError, "temperature"),
        ({"prompt": "x", "top_p": 0}, InvalidRequestError, "top_p"),
        ({"prompt": "x", "max_tokens": -1}, InvalidRequestError, "max_tokens"),
        ({"prompt": "x", "stop": [""]}, InvalidRequestError, "stop"),
        ({"prompt": "x", "request_id": "x" * 300}, InvalidRequestError, "request_id"),
        ({"token_ids": [5] * 512}, ContextLengthError, "prompt"),
    ],
)
async def test_refusals(service: Service, options: Any, error: type[TandemError], param: str) -> None:
    with pytest.raises(error) as caught:
        await service.client.generate(**options)
    assert type(caught.value) is error
    assert caught.value.param == param
    assert not service.generator.requests


async def test_no_prompt_at_all(service: Service) -> None:
    async with grpc.aio.insecure_channel(service.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match="no prompt") as caught:
            await stub.Generate(inference_pb2.GenerateRequest()).read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("error", [OverloadedError("full"), DuplicateRequestError("again"), UnavailableError("gone")])
async def test_the_generators_errors_pass_through(service: Service, error: TandemError) -> None:
    service.generator.refusal = error
    with pytest.raises(type(error), match=error.message):
        await service.client.generate(prompt="x")
    service.generator.refusal = None
    service.generator.failures = {2: error}
    with pytest.raises(type(error), match=error.message):
        await service.client.generate(prompt="x")
    await service.wait_until_idle()


@pytest.mark.parametrize(
    ("peer", "client"), [("ipv4:10.0.0.7:5000", "10.0.0.7"), ("ipv6:%5B::1%5D:5000", "::1"), ("unix:", "")]
)
def test_a_client_is_its_address(peer: str, client: str) -> None:
    assert client_of(peer) == client


async def test_who_is_refused_for_load_learns_when_to_come_again(service: Service) -> None:
    service.generator.refusal = OverloadedError("full", retry_after_s=4.25)
    with pytest.raises(OverloadedError) as refusal:
        await service.client.generate(prompt="x")
    assert refusal.value.retry_after_s == 4.25


async def test_a_fault_of_ours_is_not_told(service: Service) -> None:
    service.generator.script = lambda _: iter([1 // 0])
    with pytest.raises(InternalError, match="its log has the reason"):
        await service.client.generate(prompt="x")


async def test_a_cancelled_call_frees_everything(service: Service) -> None:
    service.generator.delay_s = 0.005
    streams = [service.client.stream(prompt=f"x{i}") for i in range(5)]
    for stream in streams:
        await anext(stream)
    assert len(service.generator.running) == 5
    for stream in streams:
        stream.close()
    await service.wait_until_idle()


async def test_the_calls_deadline_is_the_requests(service: Service) -> None:
    service.generator.delay_s = 0.01
    clock = SystemClock()
    with pytest.raises(DeadlineError):
        await service.client.generate(prompt="x", timeout_s=0.3)
    assert service.generator.requests[0].deadline_s - clock.now_s() < 0.3
    await service.wait_until_idle()


async def test_models(service: Service) -> None:
    assert await service.client.models() == (ModelInfo(MODEL, 512),)
    service.generator.max_model_len_or_none = None
    assert await service.client.models() == (ModelInfo(MODEL, 0),)


# --- what a client may do wrong --------------------------------------------------------------------------------------

GENERATE = "/tandem.v1.InferenceService/Generate"


async def _status(call: Any) -> tuple[grpc.StatusCode, str]:
    with suppress(grpc.aio.AioRpcError):
        async for _ in call:
            pass
    return await call.code(), await call.details()


@pytest.mark.parametrize("raw", [b"\xff", b"\x12\x05hi", b"\x12\x02\xff\xfe", b"\x1b" * 200])
async def test_an_unreadable_message_is_the_clients_fault(service: Service, raw: bytes) -> None:
    async with grpc.aio.insecure_channel(service.address) as channel:
        code, details = await _status(channel.unary_stream(GENERATE)(raw))
        assert (code, details) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "The request is not a protobuf message of the type that this method takes.",
        )


async def test_a_burst_of_calls_is_served(service: Service) -> None:
    """By itself, gRPC cancels some calls of a burst at random, from 1,000 on."""
    request = inference_pb2.GenerateRequest(tokens=inference_pb2.TokenPrompt(token_ids=[5]))
    request.sampling.max_tokens = 1
    async with grpc.aio.insecure_channel(service.address) as channel:
        calls = [inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=60) for _ in range(2000)]
        codes = Counter([(await _status(call))[0] for call in calls])
    assert codes == {grpc.StatusCode.OK: 2000}


async def test_calls_beyond_the_limit_are_refused_with_a_reason() -> None:
    async def forever(_: Any, context: Any) -> None:
        await asyncio.Event().wait()

    server = grpc.aio.server(interceptors=[AnswerErrors(max_calls=3)])
    handlers = {"Wait": grpc.unary_stream_rpc_method_handler(forever)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", handlers),))
    address = bind(server, "127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        waiting = [channel.unary_stream("/test.Test/Wait")(b"") for _ in range(3)]
        await asyncio.sleep(0.1)
        code, details = await _status(channel.unary_stream("/test.Test/Wait")(b""))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details == "This server has 3 calls in progress; try again later."
        waiting[0].cancel()
        await asyncio.sleep(0.1)
        code, _ = await _status(channel.unary_stream("/test.Test/Wait")(b"", timeout=0.1))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED, "there is a place again"
    await server.stop(None)


async def test_a_message_is_bounded_as_an_http_body_is(service: Service) -> None:
    async with grpc.aio.insecure_channel(service.address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        code, details = await _status(stub.Generate(inference_pb2.GenerateRequest(text="x" * (9 << 20))))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in details
    assert (await service.client.generate(token_ids=[5], max_tokens=1)).token_ids == (5,)


async def test_a_client_that_does_not_read_ends_its_request(tokenizer: TextTokenizer) -> None:
    request = inference_pb2.GenerateRequest(tokens=inference_pb2.TokenPrompt(token_ids=[5]))
    request.sampling.max_tokens, request.sampling.logprobs, request.sampling.ignore_eos = 1 << 29, 0, True
    async with serving(tokenizer) as service, grpc.aio.insecure_channel(service.address) as channel:
        service.generator.max_model_len_or_none = 1 << 30
        service.generator.tokens_per_step = 2000
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request)
        await call.read()
        async with asyncio.timeout(30):
            while service.generator.running:  # noqa: ASYNC110 - its end is seen in the generator only
                await asyncio.sleep(0.05)
        with suppress(grpc.aio.AioRpcError):
            while True:
                await call.read()
        assert await call.code() is grpc.StatusCode.CANCELLED
        assert await call.details() == "The client did not read its response for 0.5 s."


@pytest.mark.parametrize("requests", [[], [b""]])
async def test_a_request_that_does_not_come_is_not_waited_for(requests: list[bytes]) -> None:
    """Nor are more than two requests read at a time; the third one waits for its turn."""
    never = asyncio.Event()

    async def slow_requests() -> AsyncIterator[bytes]:
        await never.wait()
        yield b""

    async def answer(_: Any, context: Any) -> bytes:
        return b"answer"

    server = grpc.aio.server(interceptors=[AnswerErrors(100, RequestReads(max_reads=2, timeout_s=0.3))])
    handlers = {"Ask": grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", handlers),))
    address = bind(server, "127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        slow = [channel.stream_stream("/test.Test/Ask")(slow_requests()) for _ in range(2)]
        await asyncio.sleep(0.05)
        code, details = await _status(channel.stream_stream("/test.Test/Ask")(iter(requests)))
        assert code is (grpc.StatusCode.OK if requests else grpc.StatusCode.INVALID_ARGUMENT), details
        for call in slow:
            code, details = await _status(call)
            assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, "The request did not arrive within 0.3 s.")
    await server.stop(None)
