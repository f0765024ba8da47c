"""Traces of a running router, as a collector receives them."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import grpc
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes, rpc_attributes
from opentelemetry.semconv.attributes import (
    client_attributes,
    error_attributes,
    http_attributes,
    network_attributes,
    url_attributes,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tandem.core.clock import ManualClock
from tandem.core.config import RouterConfig
from tandem.core.errors import ConfigError
from tandem.core.monitoring_config import TracingSection
from tandem.core.request import SamplingParams
from tandem.core.request_trace import RequestTrace
from tandem.core.router_section import RouterSection
from tandem.core.timeline import PARTS, Stage, Timeline
from tandem.router.app import RouterApp
from tandem.router.records import AttemptRecord, RequestRecord
from tandem.router.request_spans import RequestSpans
from tandem.router.tracing import Tracer
from tandem.scheduling.routing import Selection
from tandem.v1 import inference_pb2, inference_pb2_grpc
from tandem.wire.channels import open_channel
from tests.otlp_receiver import OtlpReceiver, receiving_traces, values
from tests.router.grpc_workers import serve_pair

TOKEN, ANY_PORT, TRACE_ID, PARENT_ID = "secret", "127.0.0.1:0", "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, NOT_SAMPLED = (f"00-{TRACE_ID}-{PARENT_ID}-{flags}" for flags in ("01", "00"))
NUM_PARTS = len(PARTS)
CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 9,
    "temperature": 0.5,
    "seed": 3,
    "ignore_eos": True,
    "tandem": {"timeline": True},
}
ATTRIBUTES_OF_CONVENTIONS = {
    value
    for module in (
        client_attributes,
        error_attributes,
        gen_ai_attributes,
        http_attributes,
        network_attributes,
        rpc_attributes,
        url_attributes,
    )
    for value in vars(module).values()
    if isinstance(value, str)
}


@pytest.fixture
def receiver() -> "AsyncIterator[OtlpReceiver]":
    with receiving_traces() as receiver:
        yield receiver


@asynccontextmanager
async def traced_router(checkpoint: Path, endpoint: str, sample_ratio: float = 1.0) -> AsyncIterator[RouterApp]:
    """With a pair of workers. The end of the block sends what is left."""
    section = RouterSection(
        http=ANY_PORT,
        grpc=ANY_PORT,
        control=ANY_PORT,
        tracing=TracingSection(endpoint=endpoint, sample_ratio=sample_ratio),
    )
    app = RouterApp(RouterConfig(model=checkpoint, model_name="tiny", router=section, cluster_token=TOKEN))
    await app.start()
    try:
        async with serve_pair(app.control_address, "tiny", TOKEN):
            async with asyncio.timeout(20), httpx.AsyncClient(base_url=f"http://{app.address}") as http:
                while (await http.get("/health")).status_code != 200:  # noqa: ASYNC110 - the answer says when
                    await asyncio.sleep(0.01)
            yield app
    finally:
        await app.drain_and_stop(0.0)


async def post(app: RouterApp, path: str, body: object, **headers: str) -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"http://{app.address}", timeout=20) as http:
        return await http.post(path, json=body, headers=headers)


def by_name(spans: list[Span]) -> dict[str, Span]:
    assert len({span.name for span in spans}) == len(spans)
    return {span.name: span for span in spans}


async def test_a_chat_is_one_trace_with_the_parts_of_its_timeline(checkpoint: Path, receiver: OtlpReceiver) -> None:
    before_ns = time.time_ns()
    async with traced_router(checkpoint, receiver.endpoint) as app:
        response = await post(app, "/v1/chat/completions", CHAT, traceparent=SAMPLED, tracestate="other=1")
        assert response.status_code == 200
        router_id = app.instance_id
    after_ns = time.time_ns()
    assert [resource["service.name"] for resource in receiver.resources] == ["tandem-router"]
    assert receiver.resources[0]["service.instance.id"] == router_id

    spans = by_name(receiver.spans)
    parts = [spans[name.removesuffix("_s")] for _, name in PARTS]
    call, generation = spans["POST /v1/chat/completions"], spans["chat tiny"]
    assert len(spans) == 2 + NUM_PARTS
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE_ID}
    assert len({span.span_id for span in spans.values()}) == len(spans)
    assert call.parent_span_id.hex() == PARENT_ID
    assert call.trace_state == "other=1"
    assert call.kind == Span.SPAN_KIND_SERVER
    assert response.headers["traceresponse"] == f"00-{TRACE_ID}-{call.span_id.hex()}-01"
    assert generation.parent_span_id == call.span_id
    assert {part.parent_span_id for part in parts} == {generation.span_id}
    assert {span.status.code for span in spans.values()} == {Status.STATUS_CODE_UNSET}

    # The parts are the timeline that the response has, and follow each other without gaps.
    timeline = response.json()["usage"]["tandem"]["timeline"]
    seconds = [(part.end_time_unix_nano - part.start_time_unix_nano) / 1e9 for part in parts]
    assert seconds == pytest.approx(list(timeline["parts"].values()), abs=1e-6)
    edges = [generation.start_time_unix_nano, *(part.end_time_unix_nano for part in parts)]
    assert edges[:-1] == [part.start_time_unix_nano for part in parts]
    assert edges[-1] == generation.end_time_unix_nano
    assert before_ns <= call.start_time_unix_nano <= call.end_time_unix_nano <= after_ns

    about = values(list(generation.attributes))
    assert about["gen_ai.operation.name"] == "chat"
    assert (about["gen_ai.request.max_tokens"], about["gen_ai.request.temperature"]) == (9, 0.5)
    assert about["gen_ai.request.seed"] == 3
    assert about["gen_ai.usage.input_tokens"] == response.json()["usage"]["prompt_tokens"]
    assert about["gen_ai.usage.output_tokens"] == 9
    assert about["gen_ai.response.finish_reasons"] == ["length"]
    assert about["gen_ai.response.time_to_first_chunk"] == pytest.approx(timeline["ttft_s"], abs=1e-6)
    assert values(list(call.attributes))["http.response.status_code"] == 200
    assert values(list(spans["prefill"].attributes))["tandem.instance.id"] == "prefill-1"
    transfer = values(list(spans["transfer"].attributes))
    assert transfer["tandem.instance.id"] == "decode-1"
    assert transfer["tandem.transfer.source.id"] == "prefill-1"
    assert (transfer["tandem.transfer.transport"], transfer["tandem.transfer.bytes"]) == ("shared_memory", 1)
    assert values(list(spans["decode"].attributes))["tandem.instance.id"] == "decode-1"
    for span in spans.values():
        names = {attribute.key for attribute in span.attributes if not attribute.key.startswith("tandem.")}
        assert names <= ATTRIBUTES_OF_CONVENTIONS


async def test_grpc_choices_and_errors(checkpoint: Path, receiver: OtlpReceiver) -> None:
    async with traced_router(checkpoint, receiver.endpoint) as app:
        async with open_channel(app.grpc_address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            request = inference_pb2.GenerateRequest(model="tiny", text="hello")
            request.sampling.max_tokens = 3
            request.sampling.ignore_eos = True
            async for _ in stub.Generate(request, metadata=(("traceparent", SAMPLED),), timeout=20):
                pass
            request.model = "unknown"
            with pytest.raises(grpc.aio.AioRpcError):
                async for _ in stub.Generate(request, timeout=20):
                    pass
        two = {"model": "tiny", "prompt": "hello", "max_tokens": 2, "n": 2, "ignore_eos": True}
        assert (await post(app, "/v1/completions", two)).status_code == 200
        assert (await post(app, "/v1/completions", two | {"model": "unknown"})).status_code == 404
    calls = [span for span in receiver.spans if span.kind == Span.SPAN_KIND_SERVER]
    ends = ("error.type", "rpc.response.status_code", "http.response.status_code")
    found = [(span.name, values(list(span.attributes))) for span in calls]
    assert [(name, {key: about[key] for key in ends if key in about}) for name, about in found] == [
        ("tandem.v1.InferenceService/Generate", {"rpc.response.status_code": "OK"}),
        (
            "tandem.v1.InferenceService/Generate",
            {"rpc.response.status_code": "NOT_FOUND", "error.type": "model_not_found"},
        ),
        ("POST /v1/completions", {"http.response.status_code": 200}),
        ("POST /v1/completions", {"http.response.status_code": 404}),
    ]
    assert calls[0].trace_id.hex() == TRACE_ID
    assert calls[1].status.code == Status.STATUS_CODE_ERROR
    assert len({span.trace_id for span in calls}) == 4
    of_call = [[span.name for span in receiver.spans if span.parent_span_id == call.span_id] for call in calls]
    assert of_call == [["text_completion tiny"], [], ["text_completion tiny"] * 2, []]


async def test_clients_decide_and_else_the_ratio(checkpoint: Path, receiver: OtlpReceiver) -> None:
    async with traced_router(checkpoint, receiver.endpoint, sample_ratio=0.0) as app:
        for headers in ({}, {"traceparent": NOT_SAMPLED}, {"traceparent": "nonsense"}):
            response = await post(app, "/v1/chat/completions", CHAT, **headers)
            assert response.headers["traceresponse"].endswith("-00")
        assert (await post(app, "/v1/chat/completions", CHAT, traceparent=SAMPLED)).status_code == 200
        assert "traceresponse" not in (await post(app, "/v1/models", {})).headers
    assert {span.trace_id.hex() for span in receiver.spans} == {TRACE_ID}


@pytest.mark.slow
async def test_without_a_collector_requests_are_served_and_the_router_ends(checkpoint: Path) -> None:
    async with traced_router(checkpoint, "http://127.0.0.1:9/v1/traces") as app:
        assert (await post(app, "/v1/chat/completions", CHAT)).status_code == 200
        stopped_s = time.monotonic()
    assert time.monotonic() - stopped_s < 20.0


async def test_tracing_without_its_packages_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tandem.router.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ConfigError, match=r"opentelemetry is missing; pip install 'tandem-serve\[tracing\]'"):
        async with traced_router(checkpoint, "http://127.0.0.1:9/v1/traces"):
            pass


def traced_record(outcome: str = "length") -> RequestRecord:
    """Its first attempt failed after 0.2 s."""
    stamps = {stage: 1.0 + i * 0.1 for i, stage in enumerate(Stage)} | {Stage.PREFILL_QUEUED: 1.35}
    attempts = (
        AttemptRecord(0, "prefill-0", Selection("prefill-0", ()), failure="unavailable", began_s=1.15),
        AttemptRecord(
            1,
            "prefill-1",
            Selection("prefill-1", ()),
            decode_id="decode-0",
            transport="gloo",
            transfer_s=0.1,
            transfer_bytes=64,
            began_s=1.35,
        ),
    )
    timeline = Timeline(stamps, num_prompt_tokens=8, num_output_tokens=4, num_attempts=2)
    return RequestRecord(
        "r", outcome, None, timeline, attempts, trace=RequestTrace(7, 8, "chat"), sampling=SamplingParams()
    )


def export(receiver: OtlpReceiver, observe: Callable[[RequestSpans], None]) -> dict[str, Span]:
    tracer = Tracer(
        TracingSection(endpoint=receiver.endpoint),
        instance_id="router",
        clock=ManualClock(2.0),
        random=Random(1),
        wall_time_ns=lambda: 1_000_000_000_000,
    )
    observe(RequestSpans(tracer, "tiny"))
    tracer.close()
    return by_name(receiver.spans)


def test_attempts_and_overlapping_stages_are_events(receiver: OtlpReceiver) -> None:
    spans = export(receiver, lambda observer: observer.finished(traced_record()))
    generation = spans["chat tiny"]
    epoch_ns = 998_000_000_000
    assert generation.start_time_unix_nano == epoch_ns + 1_000_000_000
    assert [(event.name, (event.time_unix_nano - epoch_ns) / 1e9) for event in generation.events] == [
        ("attempt", 1.15),
        ("attempt", 1.35),
        ("decode_reserved", 1.4),
        ("transfer_started", 1.6),
    ]
    assert values(list(generation.events[0].attributes))["error.type"] == "unavailable"
    assert values(list(spans["prefill"].attributes))["tandem.instance.id"] == "prefill-1"
    assert values(list(spans["decode"].attributes))["tandem.instance.id"] == "decode-0"
    assert "error.type" not in values(list(generation.attributes))


def test_a_failed_request_is_an_error(receiver: OtlpReceiver) -> None:
    generation = export(receiver, lambda observer: observer.finished(traced_record("unavailable")))["chat tiny"]
    assert generation.status.code == Status.STATUS_CODE_ERROR
    assert values(list(generation.attributes))["error.type"] == "unavailable"
    assert "gen_ai.response.finish_reasons" not in values(list(generation.attributes))


@given(st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1))
def test_traceparent_is_what_others_read(trace_id: int, span_id: int) -> None:
    header = RequestTrace(trace_id, span_id, "chat").traceparent
    found = trace.get_current_span(TraceContextTextMapPropagator().extract({"traceparent": header})).get_span_context()
    assert (found.trace_id, found.span_id, found.trace_flags.sampled) == (trace_id, span_id, True)
