"""Channels to prefill instances: one that is given up is closed only when nothing uses it."""

import asyncio

import grpc
import pytest

from tandem.core.session import KvSource
from tandem.core.transfer import PeerGoneError
from tandem.decode_worker import peers as peers_module
from tandem.decode_worker.peers import Peers
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


async def test_a_peer_that_is_lost_is_told_until_it_can_be_reached_again() -> None:
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
