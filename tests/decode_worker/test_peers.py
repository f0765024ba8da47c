"""Channels to prefill instances: one that is given up is closed only when nothing uses it."""

import asyncio
import time

import grpc
import pytest

from tandem.core.clock import ManualClock
from tandem.core.session import KvSource
from tandem.core.transfer import PeerGoneError
from tandem.decode_worker import peers as peers_module
from tandem.decode_worker.own_delays import LOOK_S, OwnDelays
from tandem.decode_worker.peers import LATE_S, Peers
from tandem.wire.transfer import KvTransferClient
from tests.kv_transfer.holder import serve_prefill


def channels(monkeypatch: pytest.MonkeyPatch) -> list[grpc.aio.Channel]:
    """Those opened from now on."""
    opened: list[grpc.aio.Channel] = []
    open_channel = peers_module.open_channel

    def recording(address: str, tls: None, channel_options: tuple[tuple[str, int], ...]) -> grpc.aio.Channel:
        opened.append(open_channel(address, channel_options=channel_options))
        return opened[-1]

    monkeypatch.setattr(peers_module, "open_channel", recording)
    return opened


def is_closed(channel: grpc.aio.Channel) -> bool:
    return channel._channel.closed()  # type: ignore[attr-defined]


async def test_a_fetch_that_finds_its_peer_gone_does_not_fail_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = channels(monkeypatch)
    async with serve_prefill() as prefill:
        peers, source = Peers(None), KvSource("prefill-0", prefill.address)
        control = peers.control(source)
        assert peers.control(source) is control
        peers.forget("prefill-0")
        assert peers.control(source) is control  # it is not gone
        pulling = asyncio.create_task(control.pull("r", 0, 20.0))
        await asyncio.sleep(0.1)
        control._gone()
        peers.forget("prefill-0")
        assert peers.control(source) is not control
        peers.forget("prefill-0")  # a late one, about the old channel
        assert peers.control(source) is peers.control(source)
        assert len(opened) == 2
        prefill.holder.finish("r", 0, [1])
        assert (await pulling).block_ids == (1,)
        peers.control(KvSource("prefill-1", "127.0.0.1:1"))
        await asyncio.sleep(0.01)
        assert [is_closed(channel) for channel in opened] == [True, False, False]
        await peers.close()


async def test_channels_of_dead_peers_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = channels(monkeypatch)
    peers = Peers(None)
    for i in range(3):
        with pytest.raises(PeerGoneError):
            await peers.control(KvSource(f"prefill-{i}", "127.0.0.1:1")).pull("r", 0, 5.0)
        await asyncio.sleep(0.01)
    assert [is_closed(channel) for channel in opened] == [True, True, False]
    await peers.close()
    assert all(map(is_closed, opened))


async def test_too_many_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_module, "MAX_PEERS", 2)
    opened = channels(monkeypatch)
    async with serve_prefill() as prefill:
        peers = Peers(None)
        pulling = asyncio.create_task(peers.control(KvSource("prefill-0", prefill.address)).pull("r", 0, 20.0))
        await asyncio.sleep(0.1)
        for i in range(1, 5):
            peers.control(KvSource(f"prefill-{i}", "127.0.0.1:1"))
        await asyncio.sleep(0.01)
        assert [is_closed(channel) for channel in opened] == [False, True, False, False, False]
        prefill.holder.finish("r", 0, [1])
        await pulling
        await peers.close()


async def test_a_peer_that_is_lost_is_told_until_it_can_be_reached_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Peers, "was_late", False)  # as a busy machine may make it
    told: list[tuple[str, ...]] = []
    async with serve_prefill() as prefill:
        peers = Peers(None, unreachable_changed=lambda: told.append(peers.unreachable()))
        peers.control(KvSource("prefill-0", prefill.address))._gone()
        with pytest.raises(PeerGoneError):
            await peers.control(KvSource("prefill-1", "127.0.0.1:1")).pull("r", 0, 5.0)
        async with asyncio.timeout(30.0):
            while peers.unreachable() != ("prefill-1",):  # noqa: ASYNC110 - a task of its own
                await asyncio.sleep(0.02)
        assert told == [("prefill-0",), ("prefill-0", "prefill-1"), ("prefill-1",)]
        await peers.close()
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("reach-")]
    assert len(told) == 3


async def test_who_was_late_itself_condemns_nobody_without_a_try() -> None:
    """A process that did not run has read no answer to its pings, whoever sent one."""
    told: list[tuple[str, ...]] = []
    async with serve_prefill() as prefill:
        peers = Peers(None, unreachable_changed=lambda: told.append(peers.unreachable()))
        there, gone = (
            peers.control(source)
            for source in (KvSource("prefill-0", prefill.address), KvSource("prefill-1", "127.0.0.1:1"))
        )
        await asyncio.sleep(0.01)
        time.sleep(2 * LATE_S)  # noqa: ASYNC251 - the event loop stands still
        there._gone()
        gone._gone()
        assert peers.unreachable() == ()
        assert await peers.is_there(KvSource("prefill-0", prefill.address))
        assert not await peers.is_there(KvSource("prefill-1", "127.0.0.1:1"))
        async with asyncio.timeout(30.0):
            while peers.unreachable() != ("prefill-1",):  # noqa: ASYNC110 - a task of its own
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.05)
        assert told == [("prefill-1",)]
        await peers.close()
    names = [task.get_name() for task in asyncio.all_tasks()]
    assert not [name for name in names if name.startswith(("reach-", "check-", "own-delays"))]


async def test_a_peer_without_a_link_is_told_until_there_is_one() -> None:
    told: list[tuple[str, ...]] = []
    tried: list[KvTransferClient] = []

    async def can_link(peer: KvTransferClient) -> bool:
        tried.append(peer)
        return len(tried) == 2

    async with serve_prefill() as prefill:
        peers = Peers(None, unreachable_changed=lambda: told.append(peers.unreachable()))
        source = KvSource("prefill-0", prefill.address)
        peers.cannot_link(source, can_link)
        peers.cannot_link(source, can_link)  # as another fetch finds out
        async with asyncio.timeout(30.0):
            while peers.unreachable():  # noqa: ASYNC110 - a task of its own
                await asyncio.sleep(0.02)
        assert told == [("prefill-0",), ()]
        assert tried == [peers.control(source)] * 2
        await peers.close()


async def test_how_late_the_event_loop_was() -> None:
    clock = ManualClock()
    delays = OwnDelays(clock)
    assert delays.longest_s(2.0) == 0.0
    watching = asyncio.create_task(delays.watch())
    await asyncio.sleep(0)
    clock.advance(LOOK_S)
    assert delays.longest_s(2.0) == pytest.approx(0.0)
    clock.advance(0.7)  # the present delay counts, too
    assert delays.longest_s(2.0) == pytest.approx(0.7)
    await asyncio.sleep(1.5 * LOOK_S)  # a look
    clock.advance(LOOK_S)
    assert delays.longest_s(2.0) == pytest.approx(0.7)
    watching.cancel()
    clock.advance(1.9)
    assert delays.longest_s(1.0) == pytest.approx(1.9), "nothing ran since then"
