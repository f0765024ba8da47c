"""Messages that are wrong in every field, to every gRPC service of a router and of a worker."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import pytest
from google.protobuf.message import DecodeError, Message
from grpc import StatusCode
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.config import RouterConfig
from tandem.core.router_section import RouterSection
from tandem.core.session import Role
from tandem.router.app import RouterApp
from tandem.v1 import common_pb2, inference_pb2, worker_pb2
from tandem.wire.channels import open_channel
from tandem.wire.convert import status_to_pb
from tandem.wire.fleet import describe_fleet
from tests.fuzz.calls import call
from tests.fuzz.messages import damaged
from tests.fuzz.volume import tries, volumes
from tests.instance_status import make_status
from tests.router.front import write_checkpoint
from tests.router.grpc_workers import serve_pair

TOKEN = "secret"
ANY_PORT = "127.0.0.1:0"

_SAMPLING = common_pb2.SamplingParams(max_tokens=3, temperature=0.5, top_p=0.9, logprobs=2, stop_token_ids=[7])
_CHAT = inference_pb2.ChatPrompt(messages=[inference_pb2.ChatMessage(role="user", content="hi")])
PUBLIC = {
    "/tandem.v1.InferenceService/Generate": (
        inference_pb2.GenerateRequest(text="hello", sampling=_SAMPLING, stop=["zzz"]),
        inference_pb2.GenerateRequest(chat=_CHAT, sampling=_SAMPLING, model="tiny", request_id="r"),
        inference_pb2.GenerateRequest(tokens=inference_pb2.TokenPrompt(token_ids=[5, 6]), sampling=_SAMPLING),
    ),
    "/tandem.v1.InferenceService/ListModels": (inference_pb2.ListModelsRequest(),),
    "/grpc.health.v1.Health/Check": (health_pb2.HealthCheckRequest(service="tandem.v1.InferenceService"),),
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": (
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="tandem.v1.InferenceService"),
    ),
}
PUBLIC_STATUSES = {
    StatusCode.OK,
    StatusCode.INVALID_ARGUMENT,
    StatusCode.NOT_FOUND,  # another model, another service's health
    StatusCode.RESOURCE_EXHAUSTED,
}

CONTROL_STATUSES = {
    StatusCode.OK,
    StatusCode.INVALID_ARGUMENT,
    StatusCode.FAILED_PRECONDITION,  # an instance of another model
}
_STATUS = status_to_pb(make_status("other", Role.DECODE, address="127.0.0.1:1"))
_STATUS.links.add(peer_id="p", transport="gloo", transfers=1, transfer_bytes=2, transfer_s=0.5)
CONTROL = {
    "/tandem.v1.FleetService/Heartbeat": (worker_pb2.HeartbeatRequest(status=_STATUS),),
    "/tandem.v1.FleetService/Describe": (worker_pb2.DescribeRequest(with_profile=True),),
    "/tandem.v1.FleetService/ReportPlan": (
        worker_pb2.ReportPlanRequest(plan_json='{"model": "m", "verdict": "infeasible", "groups": []}'),
    ),
    "/tandem.v1.FleetService/ReportReplan": (
        worker_pb2.ReportReplanRequest(
            status=worker_pb2.ReplanStatus(
                state="stable",
                changes=[worker_pb2.ReplanStatus.Change(name="rate", planned=1.0, live=2.0)],
                proposal=worker_pb2.ReplanStatus.Proposal(summary="more", changes=["x"]),
            )
        ),
    ),
}


@asynccontextmanager
async def _router(folder: Path) -> AsyncIterator[RouterApp]:
    section = RouterSection(http=ANY_PORT, grpc=ANY_PORT, control=ANY_PORT, max_body=1 << 20)
    app = RouterApp(RouterConfig(model=folder, model_name="tiny", router=section, cluster_token=TOKEN))
    await app.start()
    try:
        yield app
    finally:
        await app.drain_and_stop(0.0)


async def _generates(channel: grpc.aio.Channel) -> bool:
    request = PUBLIC["/tandem.v1.InferenceService/Generate"][2].SerializeToString()
    return await call(channel, "/tandem.v1.InferenceService/Generate", [request]) is StatusCode.OK


async def _until_it_generates(channel: grpc.aio.Channel) -> None:
    async with asyncio.timeout(20):
        while not await _generates(channel):  # noqa: ASYNC110 - seen from outside, as a client would
            await asyncio.sleep(0.02)


async def _running(app: RouterApp) -> int:
    async with open_channel(app.control_address, TOKEN) as channel:
        described = await describe_fleet(channel, 5.0)
    return described.running_requests + described.queued_requests


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    """Hypothesis calls plain functions; they run their calls on this loop, where the server under test runs too."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture
def clean_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What is wrong with a message is the sender's fault: nothing is logged as a fault of ours."""
    yield
    faults = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert not faults, faults[:3]


def _is_readable(kind: type[Message], raw: bytes) -> bool:
    try:
        kind.FromString(raw)
    except DecodeError:
        return False
    return True


@volumes(sample=150, many=15_000)
@pytest.mark.usefixtures("clean_log")
def test_the_public_port(count: int, runner: asyncio.Runner, tmp_path: Path) -> None:
    answers: Counter[StatusCode] = Counter()
    inputs = st.sampled_from(sorted(PUBLIC)).flatmap(
        lambda method: st.tuples(st.just(method), damaged(*PUBLIC[method]))
    )
    stack = AsyncExitStack()

    async def start() -> tuple[RouterApp, grpc.aio.Channel]:
        app = await stack.enter_async_context(_router(write_checkpoint(tmp_path)))
        await stack.enter_async_context(serve_pair(app.control_address, "tiny", TOKEN))
        channel = await stack.enter_async_context(open_channel(app.grpc_address))
        await _until_it_generates(channel)
        return app, channel

    app, channel = runner.run(start())

    @tries(count)
    @given(inputs)
    def check(given: tuple[str, bytes]) -> None:
        method, raw = given
        status = runner.run(call(channel, method, [raw]))
        assert status in PUBLIC_STATUSES
        if not _is_readable(type(PUBLIC[method][0]), raw):
            assert status is StatusCode.INVALID_ARGUMENT
        answers[status] += 1

    try:
        check()
        assert runner.run(_generates(channel))
        assert answers[StatusCode.OK] > count // 50
        assert answers[StatusCode.INVALID_ARGUMENT] > count // 10
        assert runner.run(_running(app)) == 0
    finally:
        runner.run(stack.aclose())


@volumes(sample=150, many=10_000)
@pytest.mark.usefixtures("clean_log")
def test_the_control_port_with_and_without_token(count: int, runner: asyncio.Runner, tmp_path: Path) -> None:
    inputs = st.sampled_from(sorted(CONTROL)).flatmap(
        lambda method: st.tuples(st.just(method), damaged(*CONTROL[method]))
    )
    stack = AsyncExitStack()

    async def start() -> tuple[grpc.aio.Channel, grpc.aio.Channel]:
        app = await stack.enter_async_context(_router(write_checkpoint(tmp_path)))
        await stack.enter_async_context(serve_pair(app.control_address, "tiny", TOKEN))
        public = await stack.enter_async_context(open_channel(app.grpc_address))
        await _until_it_generates(public)
        return await stack.enter_async_context(open_channel(app.control_address)), public

    channel, public = runner.run(start())

    @tries(count)
    @given(inputs, st.sampled_from([TOKEN, TOKEN, TOKEN, None, "wrong", TOKEN + "x"]))
    def check(given: tuple[str, bytes], token: str | None) -> None:
        status = runner.run(call(channel, given[0], [given[1]], token))
        allowed = (
            {StatusCode.OK, StatusCode.INVALID_ARGUMENT, StatusCode.FAILED_PRECONDITION}
            if token == TOKEN
            else {StatusCode.UNAUTHENTICATED}
        )
        assert status in allowed

    try:
        check()
        runner.run(_until_it_generates(public))
    finally:
        runner.run(stack.aclose())
