"""Requests past the router, to workers that answer over real gRPC."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from tandem.core.clock import SystemClock
from tandem.core.errors import DeadlineError, UnavailableError
from tandem.core.session import InstanceState, InstanceStatus, Role
from tandem.deploy import trial
from tandem.v1 import worker_pb2_grpc
from tandem.wire.server import bind, build_server
from tandem.wire.sessions import InstanceServicer
from tests.instance_status import MODEL, make_status
from tests.router.grpc_workers import InstantDecode, InstantPrefill

TOKEN = "secret"


@asynccontextmanager
async def serve(role: Role, worker: InstantPrefill | InstantDecode) -> AsyncIterator[InstanceStatus]:
    server, _ = build_server(TOKEN)
    worker_pb2_grpc.add_InstanceServiceServicer_to_server(InstanceServicer(worker, SystemClock()), server)
    status = make_status(f"{role.value}-1", role, address=bind(server, "127.0.0.1:0"))
    await server.start()
    try:
        yield status
    finally:
        await server.stop(None)


async def try_pair(source: InstanceStatus, reader: InstanceStatus, timeout_s: float = 20.0) -> float:
    return await trial.try_instances((source, reader), MODEL, TOKEN, timeout_s, SystemClock())


async def test_a_request_goes_through_the_pair() -> None:
    prefill, decode = InstantPrefill(), InstantDecode()
    async with serve(Role.PREFILL, prefill) as source, serve(Role.DECODE, decode) as reader:
        assert 0 < await try_pair(source, reader) < 20
    assert len(prefill.outboxes) == len(decode.outboxes) == 1, "both had a session"


async def test_a_pair_that_does_not_answer() -> None:
    """Its ports are open, and its sessions too."""
    prefill = InstantPrefill(is_silent=True)
    async with serve(Role.PREFILL, prefill) as source, serve(Role.DECODE, InstantDecode()) as reader:
        with pytest.raises(DeadlineError):
            await try_pair(source, reader, timeout_s=0.5)


async def test_an_instance_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_CONNECT_S", 0.5)
    async with serve(Role.PREFILL, InstantPrefill()) as source:
        reader = make_status("decode-1", Role.DECODE, address="127.0.0.1:1")
        with pytest.raises(
            UnavailableError, match=r"^no session with 127\.0\.0\.1:\d+ and 127\.0\.0\.1:1 within 0\.5 s"
        ):
            await try_pair(source, reader)


def test_every_pair_and_every_colocated_instance() -> None:
    prefill, decode = (
        [make_status(f"{role.value}-{number}", role) for number in range(2)] for role in (Role.PREFILL, Role.DECODE)
    )
    colocated = make_status("colocated-0", Role.COLOCATED)
    loading = replace(make_status("decode-2", Role.DECODE), state=InstanceState.LOADING)
    ways = trial.ways_through([*prefill, *decode, loading, colocated])
    assert [[status.instance_id for status in way] for way in ways] == [
        ["prefill-0", "decode-0"],
        ["prefill-0", "decode-1"],
        ["prefill-1", "decode-0"],
        ["prefill-1", "decode-1"],
        ["colocated-0"],
    ]


def test_of_very_many_pairs_each_instance_has_one() -> None:
    prefill = [make_status(f"p{number}", Role.PREFILL) for number in range(90)]
    decode = [make_status(f"d{number}", Role.DECODE) for number in range(7)]
    ways = trial.ways_through([*prefill, *decode])
    assert len(ways) == 90
    assert {status.instance_id for way in ways for status in way} == {s.instance_id for s in (*prefill, *decode)}


def test_nobody_listens_for_http() -> None:
    with pytest.raises(UnavailableError, match="no answer"):
        trial.try_http("127.0.0.1:1", MODEL, 5.0, SystemClock())
