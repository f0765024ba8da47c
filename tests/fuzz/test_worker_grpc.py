"""Messages that are wrong in every field, to a worker with a real model."""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import pytest
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.config import WorkerConfig
from tandem.core.instance_section import EngineSection, InstanceSection
from tandem.core.session import InstanceStatus
from tandem.v1 import transfer_pb2, worker_pb2, worker_pb2_grpc
from tandem.wire.channels import open_channel
from tandem.wire.fleet import FleetServicer
from tandem.wire.server import bind, build_server
from tandem.wire.transfer import PROTOCOL
from tandem.worker.app import Worker
from tests.fuzz.calls import call
from tests.fuzz.messages import damaged
from tests.fuzz.test_grpc import TOKEN
from tests.fuzz.volume import tries, volumes

MODEL = Path(__file__).parents[2] / "models" / "tiny-python"
SESSION = "/tandem.v1.InstanceService/Session"
LINK = "/tandem.v1.KvTransferService/Link"
CALLS = "/tandem.v1.KvTransferService/Calls"


def _submit(**changes: object) -> worker_pb2.SessionRequest:
    pb = worker_pb2.SessionRequest()
    pb.submit.handle = 1
    attempt = pb.submit.request
    attempt.request_id, attempt.epoch, attempt.timeout_s = "r", 1, 5.0
    attempt.token_ids.extend([5, 6, 7, 8])
    attempt.sampling.max_tokens, attempt.sampling.temperature, attempt.sampling.top_p = 2, 0.7, 0.9
    attempt.sampling.logprobs = 1
    for name, value in changes.items():
        setattr(pb.submit, name, value)
    return pb


_FROM_ELSEWHERE = _submit(handle=2)
_FROM_ELSEWHERE.submit.kv.instance_id, _FROM_ELSEWHERE.submit.kv.address = "prefill-9", "127.0.0.1:1"
COMMANDS = (
    _submit(),
    _submit(hand_over=True),
    _FROM_ELSEWHERE,
    worker_pb2.SessionRequest(cancel=worker_pb2.CancelCommand(handle=1)),
    worker_pb2.SessionRequest(renew_lease=worker_pb2.RenewLeaseCommand(handle=1)),
)
_FRONTIER = transfer_pb2.KvFrontier(allocation=1, blocks=1, next_blocks=2)
_GRANT = transfer_pb2.GrantRequest(
    link_id="l", request_id="r", epoch=1, layers_end=2, blocks_end=1, total_bytes=64, chunk_bytes=64
)
TRANSFER_CALLS = (
    transfer_pb2.TransferCall(id=1, timeout_s=0.02, pull=transfer_pb2.PullRequest(request_id="r", epoch=1)),
    transfer_pb2.TransferCall(
        id=2,
        timeout_s=0.02,
        pull_computed=transfer_pb2.PullComputedRequest(request_id="r", epoch=1, known=_FRONTIER, min_new=1),
    ),
    transfer_pb2.TransferCall(id=3, timeout_s=0.02, grant=_GRANT),
    transfer_pb2.TransferCall(
        id=4, timeout_s=0.02, acknowledge=transfer_pb2.AcknowledgeRequest(request_id="r", epoch=1)
    ),
    transfer_pb2.TransferCall(id=1, cancel=transfer_pb2.CancelCall()),
)
OTHERS = {
    "/tandem.v1.InstanceService/Configure": (worker_pb2.ConfigureRequest(role=3, max_batch=4, max_batch_tokens=64),),
    "/tandem.v1.KvTransferService/RendezvousSet": (
        transfer_pb2.RendezvousSetRequest(link_id="l", key="0/1", value=b"x"),
    ),
    "/tandem.v1.KvTransferService/RendezvousGet": (transfer_pb2.RendezvousGetRequest(link_id="l", key="0/1"),),
}
STATUSES = {
    StatusCode.OK,
    StatusCode.INVALID_ARGUMENT,
    StatusCode.RESOURCE_EXHAUSTED,
    StatusCode.DEADLINE_EXCEEDED,
    StatusCode.CANCELLED,  # a session whose router has ended it
    StatusCode.FAILED_PRECONDITION,
    StatusCode.UNAVAILABLE,  # the link has ended, or was never there
}
REFUSED = {StatusCode.UNAUTHENTICATED, StatusCode.DEADLINE_EXCEEDED, StatusCode.CANCELLED}


class LastHeartbeat:
    """A `wire.fleet.Registry` that keeps what the worker reports."""

    def __init__(self) -> None:
        self.status: InstanceStatus | None = None

    def heartbeat(self, status: InstanceStatus) -> None:
        self.status = status


class RunningWorker:
    """A worker that reports here, on a loop that runs while a call is made."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self.run = runner.run
        self._stack = AsyncExitStack()
        self._heartbeat = LastHeartbeat()

    def start(self) -> grpc.aio.Channel:
        return self.run(self._start())

    async def _start(self) -> grpc.aio.Channel:
        router, _ = build_server(TOKEN)
        worker_pb2_grpc.add_FleetServiceServicer_to_server(FleetServicer(self._heartbeat), router)  # type: ignore[arg-type]
        control = bind(router, "127.0.0.1:0")
        await router.start()
        self._stack.push_async_callback(router.stop, None)
        engine = EngineSection(threads=1, kv_memory=16 << 20)
        config = WorkerConfig(
            model=MODEL,
            routers=(control,),
            heartbeat_s=0.05,
            cluster_token=TOKEN,
            instance=InstanceSection(engine=engine, transfer_timeout_s=0.2),
        )
        worker = Worker(config)
        await worker.start()
        self._stack.push_async_callback(worker.drain_and_stop, 0.0)
        return await self._stack.enter_async_context(open_channel(worker.address))

    async def _status(self, *, is_idle: bool = False) -> InstanceStatus:
        """The next one; with `is_idle`, the first one without any request."""
        self._heartbeat.status = None
        async with asyncio.timeout(20):
            while True:
                await asyncio.sleep(0.01)
                status = self._heartbeat.status
                if status is not None and not (is_idle and (status.running_requests or status.waiting_requests)):
                    return status

    def fingerprint(self) -> str:
        return self.run(self._status()).fingerprint

    def blocks_of_requests(self) -> int:
        """Blocks that belong to somebody though no request is left."""
        blocks = self.run(self._status(is_idle=True)).blocks
        return blocks.running + blocks.leased + blocks.leaked

    def close(self) -> None:
        self.run(self._stack.aclose())


@pytest.fixture
def worker() -> Iterator[RunningWorker]:
    with asyncio.Runner() as runner:
        worker = RunningWorker(runner)
        try:
            yield worker
        finally:
            worker.close()


@volumes(sample=120, many=10_000)
def test_a_worker(count: int, worker: RunningWorker, caplog: pytest.LogCaptureFixture) -> None:
    channel = worker.start()
    offer = transfer_pb2.LinkRequest(
        instance_id="decode-9",
        fingerprint=worker.fingerprint(),
        boot_id="b",
        uid=1,
        transports=[1, 2],
        protocol=PROTOCOL,
    )
    messages = {SESSION: COMMANDS, LINK: (offer,), CALLS: TRANSFER_CALLS, **OTHERS}
    answers: Counter[tuple[str, StatusCode]] = Counter()

    def inputs(method: str) -> st.SearchStrategy[tuple[str, list[bytes]]]:
        one = damaged(*messages[method])
        return st.tuples(st.just(method), st.lists(one, min_size=1, max_size=3 if method in (SESSION, CALLS) else 1))

    @tries(count)
    @given(st.sampled_from([*[SESSION] * 4, LINK, *[CALLS] * 3, *OTHERS]).flatmap(inputs), st.integers(0, 9))
    def check(given: tuple[str, list[bytes]], number: int) -> None:
        method, requests = given
        token = TOKEN if number else None
        timeout_s = 5.0 if method == SESSION else 0.05
        status = worker.run(call(channel, method, requests, token, timeout_s, hold_s=0.002 * number))
        assert status in (STATUSES if token else REFUSED)
        answers[method, status] += 1

    check()
    assert answers[SESSION, StatusCode.INVALID_ARGUMENT] > count // 50
    assert answers[SESSION, StatusCode.CANCELLED] > count // 50
    assert answers[CALLS, StatusCode.OK] > count // 50
    assert worker.blocks_of_requests() == 0
    good = [COMMANDS[0].SerializeToString()]
    assert worker.run(call(channel, SESSION, good, TOKEN, hold_s=0.5, num_responses=2)) is StatusCode.CANCELLED
    faults = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    # gRPC's, about the event loop of an earlier test in this process, which has ended.
    faults = [fault for fault in faults if "PollerCompletionQueue" not in fault]
    assert not faults, faults[:3]


def test_a_handle_twice_ends_that_session_and_not_the_worker(worker: RunningWorker) -> None:
    channel = worker.start()
    long = _submit()
    long.submit.request.sampling.max_tokens = 500
    twice = [long.SerializeToString()] * 2
    assert worker.run(call(channel, SESSION, twice, TOKEN, hold_s=0.3)) is StatusCode.INVALID_ARGUMENT
    assert worker.blocks_of_requests() == 0
    good = [COMMANDS[0].SerializeToString()]
    assert worker.run(call(channel, SESSION, good, TOKEN, hold_s=0.5, num_responses=2)) is StatusCode.CANCELLED
