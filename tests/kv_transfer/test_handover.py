"""Decode fetches from prefill over a real control channel, both in this process."""

import asyncio
import itertools
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import torch

from tandem.core.errors import (
    ConfigError,
    DeadlineError,
    IncompatiblePeerError,
    OverloadedError,
    StaleEpochError,
    TandemError,
    TransferError,
)
from tandem.core.kv_frontier import TransferChunk
from tandem.core.kv_layout import KvLayout
from tandem.core.transfer import (
    Grant,
    GrantReply,
    LinkOffer,
    LinkReply,
    Manifest,
    NoLinkError,
    PeerGoneError,
    Transport,
)
from tandem.kv_transfer import receive_links, shared_memory_link
from tandem.kv_transfer import receiver as receiver_module
from tandem.kv_transfer.arrival import ArrivingBlocks
from tandem.kv_transfer.blocks import BlockViews, LeavingBlocks
from tandem.kv_transfer.config import LinkConfig
from tandem.kv_transfer.descriptors import host_identity
from tandem.kv_transfer.fence import WriteFence
from tandem.kv_transfer.process_groups import GlooGroup
from tandem.kv_transfer.receiver import FetchResult, KvReceiver
from tandem.wire.channels import open_channel
from tandem.wire.transfer import KvTransferClient
from tests.kv_transfer.holder import LAYOUT, Prefill, blocks_of, serve_prefill, tokens

TRANSPORTS = (Transport.SHARED_MEMORY, Transport.GLOO)
CONFIG = LinkConfig(stall_s=2.0)


@asynccontextmanager
async def receiving(layout: KvLayout = LAYOUT, **options: object) -> AsyncIterator[tuple[KvReceiver, torch.Tensor]]:
    pool = torch.zeros(layout.pool_bytes, dtype=torch.uint8)
    options = {"link_config": CONFIG, **options}
    receiver = KvReceiver(layout, [pool], "decode-0", **options)  # type: ignore[arg-type]
    try:
        yield receiver, pool
    finally:
        await receiver.close()


async def fetch(
    prefill: Prefill, receiver: KvReceiver, block_ids: list[int], request_id: str = "r", epoch: int = 0
) -> FetchResult:
    token_ids = tokens(len(block_ids), prefill.layout)
    return await receiver.fetch(prefill.peer, request_id, epoch, token_ids, block_ids, time.monotonic() + 20.0)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20.0):
        while not condition():  # noqa: ASYNC110 - of other threads and processes
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("transport", [*TRANSPORTS, "auto"])
async def test_random_blocks_arrive_equal_and_others_stay(transport: Transport | str) -> None:
    rng = random.Random(3)
    async with (
        serve_prefill() as prefill,
        receiving(transport=transport, checksum=rng.random() < 0.5) as (receiver, pool),
    ):
        for epoch in range(12):
            count = rng.randint(1, 20)
            theirs, ours = (rng.sample(range(LAYOUT.num_blocks), count) for _ in range(2))
            pool.fill_(epoch)
            prefill.holder.finish("r", epoch, theirs)
            fetched = await fetch(prefill, receiver, ours, epoch=epoch)
            assert torch.equal(blocks_of(pool, LAYOUT, ours), blocks_of(prefill.pool.tensor, LAYOUT, theirs))
            rest = [block for block in range(LAYOUT.num_blocks) if block not in ours]
            assert bool((blocks_of(pool, LAYOUT, rest) == epoch).all())
            assert fetched.bytes == count * LAYOUT.block_bytes
            assert fetched.first_token.token_id == 7
            assert fetched.transport is (Transport.SHARED_MEMORY if transport == "auto" else transport)
        assert prefill.holder.acknowledged == [("r", epoch) for epoch in range(12)]
        (stats,) = receiver.links()
        assert (stats.transfers, stats.failures, stats.transport) == (12, 0, fetched.transport.value)


async def test_chunks_smaller_than_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver_module, "CHUNK_BYTES", 1000)
    async with serve_prefill() as prefill, receiving(transport=Transport.GLOO) as (receiver, pool):
        prefill.holder.finish("r", 0, list(range(20, 40)))
        await fetch(prefill, receiver, list(range(20)))
        assert torch.equal(
            blocks_of(pool, LAYOUT, list(range(20))), blocks_of(prefill.pool.tensor, LAYOUT, list(range(20, 40)))
        )


async def test_a_pull_waits_for_the_prefill_and_links_meanwhile() -> None:
    async with serve_prefill() as prefill, receiving() as (receiver, _):
        fetching = asyncio.create_task(fetch(prefill, receiver, [1, 2]))
        await until(lambda: receiver.links())
        assert not fetching.done()
        prefill.holder.finish("r", 0, [3, 4])
        assert (await fetching).bytes == 2 * LAYOUT.block_bytes


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_many_at_once_over_one_link(transport: Transport) -> None:
    async with serve_prefill() as prefill, receiving(transport=transport) as (receiver, pool):
        for i in range(20):
            prefill.holder.finish(f"r{i}", 0, [i, i + 20])
        await asyncio.gather(*(fetch(prefill, receiver, [i, i + 20], f"r{i}") for i in range(20)))
        assert torch.equal(pool, prefill.pool.tensor)
        assert len(receiver.links()) == 1


async def test_a_peer_of_other_weights_is_refused() -> None:
    other = replace(LAYOUT, weights_hash="other")
    async with serve_prefill() as prefill, receiving(other) as (receiver, pool):
        with pytest.raises(IncompatiblePeerError):
            await fetch(prefill, receiver, [1])
        assert not pool.any()
        assert prefill.sender.links() == ()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"epoch": 5}, StaleEpochError),
        ({"request_id": "other"}, StaleEpochError),
        ({"token_hash": "0" * 32}, TransferError),
        ({"num_tokens": 3}, TransferError),
        ({"fingerprint": "f" * 32}, IncompatiblePeerError),
        ({"block_ids": (1, 2, 3)}, TransferError),
        ({"block_ids": (1,)}, TransferError),
        ({"block_ids": (1, 1)}, TransferError),
        ({"block_ids": (1, 40)}, TransferError),
        ({"block_ids": (-1, 2)}, TransferError),
        ({"block_size": 8}, TransferError),
        ({"block_size": 0}, TransferError),
    ],
)
async def test_a_manifest_that_does_not_fit_is_refused(changes: dict[str, object], error: type[Exception]) -> None:
    async with serve_prefill() as prefill, receiving() as (receiver, pool):
        prefill.holder.finish("r", 0, [3, 4])
        prefill.holder.alter("r", 0, changes)
        with pytest.raises(error):
            await fetch(prefill, receiver, [1, 2])
        assert not pool.any()
        assert prefill.holder.acknowledged == []


@pytest.mark.parametrize(
    "changes",
    [
        {"total_bytes": 1 << 30},
        {"total_bytes": 1},
        {"sequence": 3},
        {"chunk_bytes": 0},
        {"chunk_bytes": 1 << 40},
        {"rank": 1},
        {"rank": -1},
        {"link_id": "nobody"},
        {"allocation": 1},
        {"part": TransferChunk(range(LAYOUT.num_layers), range(3)), "total_bytes": 3 * LAYOUT.block_bytes},
        {"part": TransferChunk(range(2 * LAYOUT.num_layers), range(1))},
        {"part": TransferChunk(range(-1, LAYOUT.num_layers), range(2))},
        {"part": TransferChunk(range(3, 2), range(2)), "total_bytes": 0},
    ],
)
async def test_a_grant_that_does_not_fit_moves_nothing(changes: dict[str, object]) -> None:
    async with serve_prefill() as prefill:
        prefill.holder.finish("r", 0, [3, 4])
        offer = LinkOffer("decode-0", LAYOUT.fingerprint, host_identity(), (Transport.SHARED_MEMORY,))
        reply = await prefill.peer.link(offer, 5.0)
        whole = TransferChunk(range(LAYOUT.num_layers), range(2))
        fits = Grant(reply.link_id, "r", 0, 0, 0, 0, whole, 2 * LAYOUT.block_bytes, 4096, True)
        with pytest.raises(TransferError):
            await prefill.peer.grant(replace(fits, **changes), 5.0)  # type: ignore[arg-type]
        assert (await prefill.peer.grant(fits, 5.0)).checksum != 0
        prefill.peer.unlink(reply.link_id)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_lease_that_ended_before_the_acknowledgement(transport: Transport) -> None:
    async with serve_prefill() as prefill, receiving(transport=transport) as (receiver, _):
        prefill.holder.finish("r", 0, [3, 4])
        prefill.holder.lease_lost = True
        with pytest.raises(StaleEpochError):
            await fetch(prefill, receiver, [1, 2])
        assert receiver.links()[0].failures == 0, "a request that has ended meanwhile is no fault of the link"


async def test_an_older_attempt_is_stale() -> None:
    async with serve_prefill() as prefill, receiving() as (receiver, _):
        prefill.holder.finish("r", 1, [3])
        with pytest.raises(StaleEpochError):
            await fetch(prefill, receiver, [1], epoch=0)


async def test_a_byte_corrupted_on_the_way_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    send = GlooGroup.send

    def corrupt(group: GlooGroup, data: torch.Tensor) -> object:
        data[len(data) // 2] ^= 1
        return send(group, data)

    async with serve_prefill() as prefill, receiving(transport=Transport.GLOO) as (receiver, _):
        prefill.holder.finish("r", 0, [3, 4])
        with monkeypatch.context() as patch:
            patch.setattr(GlooGroup, "send", corrupt)
            with pytest.raises(TransferError):
                await fetch(prefill, receiver, [1, 2])
        assert prefill.holder.acknowledged == []
        await fetch(prefill, receiver, [1, 2])  # it is still held, and a new try gets it


async def test_a_byte_corrupted_in_the_copy_is_found_where_checksums_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with (
        serve_prefill() as prefill,
        receiving(transport=Transport.SHARED_MEMORY, checksum=True) as (receiver, pool),
    ):
        copy = shared_memory_link.copy_blocks

        def corrupt(*arguments: object) -> None:
            copy(*arguments)  # type: ignore[arg-type]
            pool[((2 * 2 + 1) * LAYOUT.num_blocks + 1) * LAYOUT.segment_bytes] ^= 1

        prefill.holder.finish("r", 0, [3, 4])
        monkeypatch.setattr(shared_memory_link, "copy_blocks", corrupt)
        with pytest.raises(TransferError):
            await fetch(prefill, receiver, [1, 2])
        assert prefill.holder.acknowledged == []


class Pause:
    """Holds a copying thread at one place until the test has looked around."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._resumed = threading.Event()

    def here(self) -> None:
        self.reached.set()
        self._resumed.wait(20.0)

    def resume(self) -> None:
        self._resumed.set()


@pytest.fixture
def mid_copy(monkeypatch: pytest.MonkeyPatch) -> Pause:
    """Pauses the first copy out of shared memory after its first block."""
    pause, copy = Pause(), shared_memory_link.copy_blocks

    def paused(
        source: BlockViews, source_ids: list[int], target: BlockViews, target_ids: list[int], fence: WriteFence
    ) -> None:
        copy(source, source_ids[:1], target, target_ids[:1], fence)
        if not pause.reached.is_set():
            pause.here()
        copy(source, source_ids, target, target_ids, fence)

    monkeypatch.setattr(shared_memory_link, "copy_blocks", paused)
    return pause


@pytest.fixture
def mid_send(monkeypatch: pytest.MonkeyPatch) -> Pause:
    """Pauses the first transfer over gloo at its third chunk, of many."""
    pause, send, chunks_sent = Pause(), GlooGroup.send, itertools.count()

    def paused(group: GlooGroup, data: torch.Tensor) -> object:
        if len(data) <= 1000 and next(chunks_sent) == 2:
            pause.here()
        return send(group, data)

    monkeypatch.setattr(GlooGroup, "send", paused)
    monkeypatch.setattr(receiver_module, "CHUNK_BYTES", 1000)
    return pause


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_cancelled_fetch_leaves_its_blocks_at_once(
    transport: Transport, mid_copy: Pause, mid_send: Pause
) -> None:
    pause = mid_copy if transport is Transport.SHARED_MEMORY else mid_send
    block_ids = list(range(LAYOUT.num_blocks))
    async with serve_prefill() as prefill, receiving(transport=transport) as (receiver, pool):
        prefill.holder.finish("r", 0, block_ids)
        fetching = asyncio.create_task(fetch(prefill, receiver, block_ids))
        await until(pause.reached.is_set)
        await until(pool.any)
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
        pool.fill_(9)
        pause.resume()
        await asyncio.sleep(0.1)
        assert bool((pool == 9).all())
        assert prefill.holder.acknowledged == []
        await fetch(prefill, receiver, block_ids)  # over a new process group where the old one was in use
        assert torch.equal(pool, prefill.pool.tensor)


async def test_a_cancelled_fetch_does_not_fail_the_others(mid_send: Pause) -> None:
    async with serve_prefill() as prefill, receiving(transport=Transport.GLOO) as (receiver, pool):
        for i in range(5):
            prefill.holder.finish(f"r{i}", 0, [i, i + 5, i + 10])
        fetching = [asyncio.create_task(fetch(prefill, receiver, [i, i + 5, i + 10], f"r{i}")) for i in range(5)]
        await until(mid_send.reached.is_set)
        fetching[0].cancel()
        mid_send.resume()
        await asyncio.gather(*fetching[1:])
        arrived = [i + step for step in (0, 5, 10) for i in range(1, 5)]
        assert torch.equal(blocks_of(pool, LAYOUT, arrived), blocks_of(prefill.pool.tensor, LAYOUT, arrived))
        assert fetching[0].cancelled()


async def test_the_deadline_ends_the_wait_for_the_prefill() -> None:
    async with serve_prefill() as prefill, receiving() as (receiver, _):
        with pytest.raises(DeadlineError):
            await receiver.fetch(prefill.peer, "r", 0, tokens(1), [1], time.monotonic() + 0.3)
        with pytest.raises(DeadlineError):
            await receiver.fetch(prefill.peer, "r", 0, tokens(1), [1], time.monotonic() - 1.0)


async def test_no_shared_memory_between_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = replace(host_identity(), boot_id="another")
    monkeypatch.setattr(receive_links, "host_identity", lambda: elsewhere)
    async with serve_prefill() as prefill:
        prefill.holder.finish("r", 0, [1])
        async with receiving(transport="auto") as (receiver, _):
            assert (await fetch(prefill, receiver, [1])).transport is Transport.GLOO
        async with receiving(transport="shared_memory") as (receiver, _):
            with pytest.raises(IncompatiblePeerError):  # never a silent slow transport
                await fetch(prefill, receiver, [1])


async def test_shared_memory_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> int:
        raise TransferError("another network namespace")

    monkeypatch.setattr(shared_memory_link, "fetch_descriptor", unreachable)
    async with serve_prefill() as prefill:
        prefill.holder.finish("r", 0, [1])
        async with receiving(transport="auto") as (receiver, _):
            assert (await fetch(prefill, receiver, [1])).transport is Transport.GLOO
        async with receiving(transport="shared_memory") as (receiver, _):
            with pytest.raises(TransferError):
                await fetch(prefill, receiver, [1])


def test_an_unknown_transport_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError):
        KvReceiver(LAYOUT, [torch.zeros(LAYOUT.pool_bytes, dtype=torch.uint8)], "decode-0", transport="pigeon")


async def test_a_worker_that_was_restarted_is_another_peer() -> None:
    async with serve_prefill(instance_id="prefill-new") as prefill, receiving() as (receiver, _):
        channel = open_channel(prefill.address)
        with pytest.raises(TransferError):
            await receiver.fetch(
                KvTransferClient(channel, "prefill-old"), "r", 0, tokens(1), [1], time.monotonic() + 5.0
            )
        await channel.close()
        await until(lambda: not prefill.sender._links)


async def test_a_peer_that_is_not_there() -> None:
    async with receiving() as (receiver, _):
        channel = open_channel("127.0.0.1:1")
        with pytest.raises(PeerGoneError):
            await receiver.fetch(KvTransferClient(channel, "prefill-0"), "r", 0, tokens(1), [1], time.monotonic() + 5.0)
        await channel.close()


async def test_links_are_bounded_and_the_idle_go_first() -> None:
    config = replace(CONFIG, max_links=2)
    async with serve_prefill(config=config) as prefill:
        receivers = [
            KvReceiver(LAYOUT, [torch.zeros(LAYOUT.pool_bytes, dtype=torch.uint8)], f"decode-{i}") for i in range(3)
        ]
        for i, receiver in enumerate(receivers):
            prefill.holder.finish(f"r{i}", 0, [i])
            await fetch(prefill, receiver, [i], f"r{i}")
        assert {link.peer_id for link in prefill.sender._links.values()} == {"decode-1", "decode-2"}
        prefill.holder.finish("again", 0, [5])
        await fetch(prefill, receivers[0], [5], "again")  # it was evicted, and links anew
        for link in prefill.sender._links.values():
            link.sending = 1
        with pytest.raises(OverloadedError):
            await fetch(prefill, receivers[1], [6], "r9")
        for receiver in receivers:
            await receiver.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_dropping_a_peer_ends_the_link_on_both_sides(transport: Transport) -> None:
    async with serve_prefill() as prefill, receiving(transport=transport) as (receiver, _):
        prefill.holder.finish("r", 0, [1])
        await fetch(prefill, receiver, [1])
        assert len(prefill.sender._links) == 1
        receiver.drop("prefill-0")
        assert [(stats.peer_id, stats.transfers) for stats in receiver.links()] == [("other", 1)]
        await until(lambda: not prefill.sender._links)
        prefill.holder.finish("r", 1, [1])
        await fetch(prefill, receiver, [1], epoch=1)
        prefill.sender.drop("decode-0")
        await until(lambda: not receiver._links.by_peer)  # its end too, without a fetch that finds out
        prefill.holder.finish("r", 2, [1])
        await fetch(prefill, receiver, [1], epoch=2)


async def test_statistics_are_bounded_on_both_sides() -> None:
    config = replace(CONFIG, max_links=2)
    async with serve_prefill(config=config) as prefill:
        for i in range(5):
            async with receiving(transport=Transport.GLOO) as (receiver, _):
                receiver._links._instance_id = f"decode-{i}"
                prefill.holder.finish(f"r{i}", 0, [i])
                await fetch(prefill, receiver, [i], f"r{i}")
        counts = {stats.peer_id: stats.transfers for stats in prefill.sender.links()}
        assert counts == {"decode-3": 1, "decode-4": 1, "other": 3}
    async with receiving(link_config=config) as (receiver, _):
        for i in range(5):
            async with serve_prefill(instance_id=f"prefill-{i}") as prefill:
                prefill.holder.finish("r", 0, [i])
                await fetch(prefill, receiver, [i])
                receiver._links.unlink(prefill.peer.instance_id)  # by itself, not because the instance is gone
        counts = {stats.peer_id: stats.transfers for stats in receiver.links()}
        assert counts == {"prefill-3": 1, "prefill-4": 1, "other": 3}


async def test_every_fetch_on_a_channel_that_is_closed_ends_with_a_retryable_error(mid_send: Pause) -> None:
    """One fetch that waits for its prefill, one that moves bytes, one that waits for its turn, one that comes later."""
    block_ids = list(range(20))
    async with serve_prefill() as prefill, receiving(transport=Transport.GLOO) as (receiver, _):
        channel = open_channel(prefill.address)
        peer = KvTransferClient(channel, "prefill-0")

        def fetching(request_id: str) -> "asyncio.Task[FetchResult]":
            deadline_s = time.monotonic() + 20.0
            return asyncio.create_task(
                receiver.fetch(peer, request_id, 0, tokens(len(block_ids)), block_ids, deadline_s)
            )

        prefill.holder.finish("moving", 0, block_ids)
        prefill.holder.finish("next", 0, block_ids)
        fetches = [fetching("moving"), fetching("waiting")]
        await until(mid_send.reached.is_set)
        fetches.append(fetching("next"))
        await asyncio.sleep(0.1)
        await channel.close()
        fetches.append(fetching("late"))
        outcomes = await asyncio.gather(*fetches, return_exceptions=True)
        mid_send.resume()
        assert all(isinstance(outcome, TandemError) and outcome.retryable for outcome in outcomes), outcomes
        assert peer.is_gone
        await fetch(prefill, receiver, block_ids, "next")  # over another channel


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_an_unexpected_error_of_a_transfer_is_retryable(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    async with serve_prefill() as prefill, receiving(transport=transport) as (receiver, _):
        prefill.holder.finish("r", 0, [1])
        with monkeypatch.context() as patch:
            patch.setattr(shared_memory_link, "copy_blocks", fail)
            patch.setattr(ArrivingBlocks, "scatter", fail)
            with pytest.raises(TransferError):
                await fetch(prefill, receiver, [1])
        await fetch(prefill, receiver, [1])


async def test_a_link_that_is_not_made_in_time_is_a_transfer_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The request has time left, and another pair may serve it. Its own deadline bounds the wait of each fetch."""

    async def forever(offer: LinkOffer) -> LinkReply:
        await asyncio.Event().wait()
        raise AssertionError

    async with serve_prefill() as prefill, receiving(link_config=replace(CONFIG, link_timeout_s=2.0)) as (receiver, _):
        monkeypatch.setattr(prefill.sender, "link", forever)
        patient = asyncio.create_task(fetch(prefill, receiver, [1]))
        await asyncio.sleep(0)
        with pytest.raises(DeadlineError):  # it waits for the link that the other fetch makes
            await receiver.fetch(prefill.peer, "r", 0, tokens(1), [2], time.monotonic() + 0.2)
        assert not patient.done()
        waiting = asyncio.create_task(fetch(prefill, receiver, [3]))
        with pytest.raises(NoLinkError):
            await patient
        with pytest.raises(NoLinkError):
            await asyncio.wait_for(waiting, 1.0)  # it does not find out by itself, which would take as long once more
        assert not await receiver.can_link(prefill.peer)
        monkeypatch.undo()
        assert await receiver.can_link(prefill.peer)
        prefill.holder.finish("r", 0, [1])
        await fetch(prefill, receiver, [1])


async def test_a_network_that_carries_calls_and_no_kv(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(rank: int, *_: object) -> GlooGroup:
        raise TransferError("the two ranks of the KV link did not connect")

    async with serve_prefill() as prefill, receiving(transport=Transport.GLOO) as (receiver, _):
        prefill.holder.finish("r", 0, [1])
        with monkeypatch.context() as patch:
            patch.setattr(GlooGroup, "connect", fail)
            with pytest.raises(NoLinkError):
                await fetch(prefill, receiver, [1])
            assert not prefill.peer.is_gone
            assert not await receiver.can_link(prefill.peer)
        assert await receiver.can_link(prefill.peer)
        await fetch(prefill, receiver, [1])


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_grant_that_was_refused_does_not_break_the_later_ones(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease ends between the pull and the grant."""

    async def refuse(grant: Grant, manifest: Manifest) -> GrantReply:
        raise StaleEpochError("the lease has ended")

    async with serve_prefill() as prefill, receiving(transport=transport, checksum=True) as (receiver, pool):
        for epoch in range(3):
            prefill.holder.finish("r", epoch, [3, 4])
            with monkeypatch.context() as patch:
                patch.setattr(prefill.sender, "send", refuse)
                with pytest.raises(StaleEpochError):
                    await fetch(prefill, receiver, [1, 2], epoch=epoch)
            await fetch(prefill, receiver, [1, 2], epoch=epoch)
            assert torch.equal(blocks_of(pool, LAYOUT, [1, 2]), blocks_of(prefill.pool.tensor, LAYOUT, [3, 4]))


async def test_a_cancelled_checksum_leaves_the_link_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    pause, checksum = Pause(), LeavingBlocks.checksum

    def paused(blocks: LeavingBlocks) -> int:
        if not pause.reached.is_set():
            pause.here()  # on the prefill side
        return checksum(blocks)

    monkeypatch.setattr(LeavingBlocks, "checksum", paused)
    async with (
        serve_prefill() as prefill,
        receiving(transport=Transport.SHARED_MEMORY, checksum=True) as (receiver, _),
    ):
        for i in range(3):
            prefill.holder.finish(f"r{i}", 0, [i])
        fetches = [asyncio.create_task(fetch(prefill, receiver, [0], "r0"))]
        await until(pause.reached.is_set)
        fetches += [asyncio.create_task(fetch(prefill, receiver, [i], f"r{i}")) for i in (1, 2)]
        link = receiver._links.by_peer["prefill-0"]
        fetches[0].cancel()
        await asyncio.gather(*fetches[1:])
        pause.resume()
        assert fetches[0].cancelled()
        assert receiver._links.by_peer["prefill-0"] is link
        assert link.alive


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_waiting_for_earlier_transfers_does_not_use_up_the_time_out(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, send = shared_memory_link.copy_blocks, GlooGroup.send

    def slow_copy(*arguments: object) -> None:
        time.sleep(0.5)
        copy(*arguments)  # type: ignore[arg-type]

    def slow_send(group: GlooGroup, data: torch.Tensor) -> object:
        if len(data) == LAYOUT.block_bytes:
            time.sleep(0.5)
        return send(group, data)

    monkeypatch.setattr(shared_memory_link, "copy_blocks", slow_copy)
    monkeypatch.setattr(GlooGroup, "send", slow_send)
    async with serve_prefill() as prefill, receiving(transport=transport, timeout_s=2.5) as (receiver, _):
        for i in range(8):  # 4 s together
            prefill.holder.finish(f"r{i}", 0, [i])
        await asyncio.gather(*(fetch(prefill, receiver, [i], f"r{i}") for i in range(8)))
        assert receiver.links()[0].failures == 0
        prefill.holder.finish("late", 0, [1])
        fetches = [asyncio.create_task(fetch(prefill, receiver, [1], "late"))]
        await asyncio.sleep(0.1)
        with pytest.raises(DeadlineError):  # the request's own deadline bounds the wait for the turn
            await receiver.fetch(prefill.peer, "late", 0, tokens(1), [2], time.monotonic() + 0.1)
        await asyncio.gather(*fetches)


async def test_an_abort_that_blocks_does_not_block_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, leave = threading.Event(), threading.Event()
    left: list[bool] = []
    abort = GlooGroup.abort

    def blocking_abort(group: GlooGroup) -> None:
        entered.set()
        left.append(leave.wait(10.0))
        abort(group)

    async with serve_prefill() as prefill, receiving(transport=Transport.GLOO) as (receiver, _):
        prefill.holder.finish("r", 0, [1])
        await fetch(prefill, receiver, [1])
        monkeypatch.setattr(GlooGroup, "abort", blocking_abort)
        receiver.drop("prefill-0")
        await until(lambda: not prefill.sender._links)  # both sides abort
        await until(entered.is_set)
        leave.set()
    assert left == [True, True]
