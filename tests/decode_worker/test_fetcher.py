"""One report for each fetch, however it ends: the loop waits for it before it uses the blocks again."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tandem.core.attempt_id import AttemptId
from tandem.core.errors import InternalError, TransferError
from tandem.core.request import SampledToken
from tandem.core.session import KvSource
from tandem.core.transfer import NoLinkError, PeerGoneError, Transport
from tandem.decode_worker.fetcher import Fetch, FetchFailed, KvArrived, KvFetcher


class Result:
    first_token = SampledToken(7)
    seconds = 0.25
    bytes = 64
    transport = Transport.GLOO
    streamed_bytes = 32
    streamed_s = 0.5


class Receiver:
    """`fetches[request id]` is what a fetch does."""

    def __init__(self, **fetches: Callable[[], Awaitable[Result]]) -> None:
        self._fetches = fetches

    async def can_link(self, peer: str) -> bool:
        return True

    async def fetch(self, peer: str, request_id: str, *_: Any) -> Result:
        assert peer == "control of prefill-1"
        return await self._fetches[request_id]()


class Peers:
    is_closed = False
    found = False

    def __init__(self) -> None:
        self.without_link: list[str] = []

    def control(self, source: KvSource) -> str:
        return f"control of {source.instance_id}"

    async def is_there(self, source: KvSource) -> bool:
        return self.found

    def cannot_link(self, source: KvSource, can_link: object) -> None:
        self.without_link.append(source.instance_id)

    async def close(self) -> None:
        self.is_closed = True


def fetch(request_id: str, handle: int = 1) -> Fetch:
    return Fetch(AttemptId(0, handle), request_id, 0, (1, 2), KvSource("prefill-1", "127.0.0.1:1"), (3,), 10.0)


def make(**fetches: Callable[[], Awaitable[Result]]) -> tuple[KvFetcher, list[KvArrived | FetchFailed], Peers]:
    reports: list[KvArrived | FetchFailed] = []
    peers = Peers()
    fetcher = KvFetcher(reports.append, peers)  # type: ignore[arg-type]
    fetcher.fetch_with(Receiver(**fetches))  # type: ignore[arg-type]
    return fetcher, reports, peers


async def forever() -> Result:
    await asyncio.sleep(3600)
    raise AssertionError("never reached")


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_kv_that_arrives_is_reported_with_its_first_token() -> None:
    async def arrive() -> Result:
        return Result()

    fetcher, reports, _ = make(r=arrive)
    fetcher.start(fetch("r"))
    await settle()
    assert reports == [KvArrived(AttemptId(0, 1), SampledToken(7), 0.25, 64, Transport.GLOO, 32, 0.5)]


@pytest.mark.parametrize(
    ("raised", "reported"),
    [
        (TransferError("torn"), TransferError),
        (PeerGoneError("gone"), PeerGoneError),
        (ZeroDivisionError("a fault of ours"), InternalError),
    ],
)
async def test_every_failure_is_reported_as_an_error_with_a_code(raised: Exception, reported: type) -> None:
    async def fail() -> Result:
        raise raised

    fetcher, reports, _ = make(r=fail)
    fetcher.start(fetch("r"))
    await settle()
    (report,) = reports
    assert isinstance(report, FetchFailed)
    assert type(report.error) is reported
    assert "a fault of ours" not in report.error.message


async def test_a_fetch_that_is_cancelled_before_its_first_step_is_reported_too() -> None:
    fetcher, reports, _ = make(r=forever)
    fetcher.start(fetch("r"))
    fetcher.cancel(AttemptId(0, 1))
    fetcher.cancel(AttemptId(0, 99))  # unknown
    await settle()
    assert [(type(report), report.attempt_id) for report in reports] == [(FetchFailed, AttemptId(0, 1))]


async def test_close_reports_all_that_are_under_way_and_closes_the_channels() -> None:
    fetcher, reports, peers = make(r=forever, s=forever)
    fetcher.start(fetch("r", 1))
    fetcher.start(fetch("s", 2))
    await settle()
    await fetcher.close()
    assert sorted(report.attempt_id.handle for report in reports) == [1, 2]
    assert peers.is_closed


@pytest.mark.parametrize("found", [False, True])
async def test_a_peer_that_is_there_all_the_same_is_asked_again(found: bool) -> None:
    """Once: its connection may have ended because nobody here read what it had answered."""
    tries = []

    async def lose_once() -> Result:
        tries.append(1)
        if len(tries) == 1:
            raise PeerGoneError("the prefill worker cannot be reached")
        return Result()

    fetcher, reports, peers = make(r=lose_once)
    peers.found = found
    fetcher.start(fetch("r"))
    await settle()
    (report,) = reports
    assert isinstance(report, KvArrived if found else FetchFailed)

    async def lose() -> Result:
        tries.append(1)
        raise PeerGoneError("the prefill worker cannot be reached")

    fetcher, reports, peers = make(r=lose)
    peers.found = found
    tries.clear()
    fetcher.start(fetch("r"))
    await settle()
    assert isinstance(reports[0], FetchFailed)
    assert len(tries) == 1 + found


async def test_a_peer_with_which_no_link_can_be_made_is_told() -> None:
    async def fail() -> Result:
        raise NoLinkError("the KV link could not be made in time")

    fetcher, reports, peers = make(r=fail)
    fetcher.start(fetch("r"))
    await settle()
    assert isinstance(reports[0], FetchFailed)
    assert reports[0].error.code == "transfer_failed"
    assert peers.without_link == ["prefill-1"]
