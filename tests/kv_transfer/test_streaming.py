"""KV comes while the prefill is computed: over a real control channel, both transports, and unequal shapes."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import torch

from tandem.core.errors import StaleEpochError, TransferError
from tandem.core.kv_frontier import KvFrontier, StageFrontier
from tandem.core.kv_layout import KvLayout
from tandem.core.transfer import PeerGoneError, Transport
from tandem.kv_transfer import shared_memory_link
from tandem.kv_transfer.config import LinkConfig
from tandem.kv_transfer.process_groups import GlooGroup
from tandem.kv_transfer.receiver import FetchResult, KvReceiver
from tests.kv_transfer.holder import Prefill, serve_prefill, tokens
from tests.kv_transfer.shapes import make_replicas_equal, shaped, tokens_of

TRANSPORTS = (Transport.SHARED_MEMORY, Transport.GLOO)
NUM_BLOCKS = 32
THEIRS = [9, 2, 30, 17, 5, 11]


def layout(block_size: int = 8, **division: object) -> KvLayout:
    return KvLayout(5, NUM_BLOCKS, 2, block_size, 8, "bfloat16", "w", **division)  # type: ignore[arg-type]


class Stream:
    """One transfer of THEIRS, while the test says what is computed. What is not computed yet are zeros."""

    def __init__(
        self, prefill: Prefill, receiver: KvReceiver, pools: list[torch.Tensor], destination: KvLayout
    ) -> None:
        self.prefill, self.receiver, self.pools, self.destination = prefill, receiver, pools, destination
        self.source = prefill.layout
        self.num_tokens = len(tokens(len(THEIRS), self.source))
        self.ours = random.Random(2).sample(range(NUM_BLOCKS), destination.blocks_for(self.num_tokens))
        self.final = [pool.tensor.clone() for pool in prefill.pools]
        for pool in prefill.pools:
            pool.tensor.zero_()
        self.fetching: asyncio.Task[FetchResult] = asyncio.create_task(
            receiver.fetch(prefill.peer, "r", 0, tokens(len(THEIRS), self.source), self.ours, time.monotonic() + 20.0)
        )

    async def compute(self, frontier: KvFrontier) -> None:
        """Up to there; return when it has come, or when the reader gave up streaming."""
        for chunk in frontier.beyond(KvFrontier()):
            for rank, (pool, final) in enumerate(zip(self.prefill.pools, self.final, strict=True)):
                held = self.source.layers(rank)
                layers = [layer - held.start for layer in chunk.layers if layer in held]
                ids = [THEIRS[block] for block in chunk.blocks]
                for layer in layers:
                    now, then = (shaped(each, self.source, rank)[layer] for each in (pool.tensor, final))
                    now[:, ids] = then[:, ids]
        holder = self.prefill.holder
        await holder.announce("r", 0, THEIRS, frontier)
        await until(lambda: frontier in holder.known or self.fetching.done())

    async def finish(self, allocation: int = 1) -> FetchResult:
        for pool, final in zip(self.prefill.pools, self.final, strict=True):
            pool.tensor.copy_(final)
        self.prefill.holder.finish("r", 0, THEIRS, allocation)
        return await self.fetching

    def check(self) -> None:
        expected = tokens_of(self.final, self.source, THEIRS, self.num_tokens)
        assert torch.equal(tokens_of(self.pools, self.destination, self.ours, self.num_tokens), expected)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20.0):
        while not condition():  # noqa: ASYNC110 - of another task
            await asyncio.sleep(0.001)


@asynccontextmanager
async def streaming(
    transport: Transport, source: KvLayout | None = None, destination: KvLayout | None = None, **options: object
) -> AsyncIterator[Stream]:
    source, destination = source or layout(), destination or layout()
    pools = [
        torch.zeros(destination.pool_of(rank).pool_bytes, dtype=torch.uint8) for rank in range(destination.num_ranks)
    ]
    options = {"stream_from_bytes": 1, "link_config": LinkConfig(stall_s=2.0), **options}
    async with serve_prefill(source) as prefill:
        make_replicas_equal([pool.tensor for pool in prefill.pools], source)
        receiver = KvReceiver(destination, pools, "decode-0", transport=transport, **options)  # type: ignore[arg-type]
        stream = Stream(prefill, receiver, pools, destination)
        try:
            yield stream
        finally:
            stream.fetching.cancel()
            await asyncio.gather(stream.fetching, return_exceptions=True)
            await receiver.close()


# Cached blocks, layers of a chunk, another chunk, its layers, and the last one.
STEPS = ((2, 4, 0), (2, 4, 1), (2, 4, 3), (4, 6, 2), (4, 6, 5))

PAIRS = [
    (layout(), layout()),
    (layout(tp=4), layout(tp=3)),  # heads on several ranks, on both sides
    (layout(6, tp=2), layout(16, layers_per_stage=(2, 2, 1))),
]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("pair", PAIRS, ids=range(len(PAIRS)))
async def test_what_is_computed_comes_before_the_end(pair: tuple[KvLayout, KvLayout], transport: Transport) -> None:
    async with streaming(transport, *pair, checksum=True) as stream:
        for blocks, next_blocks, layers in STEPS:
            await stream.compute(KvFrontier(1, blocks, next_blocks, layers, 5))
        stream.check()
        fetched = await stream.finish()
        assert fetched.streamed_bytes == fetched.bytes
        assert fetched.streamed_s > 0
        stream.check()
        (stats,) = stream.receiver.links()
        assert (stats.transfers, stats.failures) == (1, 0)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_the_layers_of_later_stages_come_as_they_are_computed(transport: Transport) -> None:
    async with streaming(transport, layout(layers_per_stage=(2, 1, 2)), layout(tp=2)) as stream:
        for first, *later in (
            (KvFrontier(1, 0, 4, 2, 2), StageFrontier(0, 0, 0, 1), StageFrontier(0, 0, 0, 2)),
            (KvFrontier(1, 4, 6, 1, 2), StageFrontier(0, 4, 1, 1), StageFrontier(0, 4, 1, 2)),
            (KvFrontier(1, 4, 6, 2, 2), StageFrontier(4, 6, 1, 1), StageFrontier(4, 6, 0, 2)),
        ):
            await stream.compute(replace(first, later=tuple(later)))
        fetched = await stream.finish()
        assert fetched.streamed_bytes == fetched.bytes * (5 * 6 - 2 * 2) // (5 * 6)
        stream.check()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_the_layers_of_later_stages_come_at_the_end(transport: Transport) -> None:
    async with streaming(transport, layout(layers_per_stage=(3, 2)), layout(tp=2)) as stream:
        await stream.compute(KvFrontier(1, 0, 4, 2, 3))
        await stream.compute(KvFrontier(1, 4, 6, 3, 3))
        fetched = await stream.finish()
        assert fetched.streamed_bytes == fetched.bytes * 3 // 5
        stream.check()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_what_came_from_blocks_that_were_taken_away_does_not_count(transport: Transport) -> None:
    async with streaming(transport) as stream:
        for pool in stream.final:
            pool.add_(1)
        await stream.compute(KvFrontier(1, 4, 6, 5, 5))
        for pool in stream.final:
            pool.sub_(1)
        await stream.compute(KvFrontier(2, 2, 6, 1, 5))
        fetched = await stream.finish(allocation=2)
        assert 0 < fetched.streamed_bytes < fetched.bytes
        stream.check()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_manifest_of_other_blocks_makes_all_of_it_come_again(transport: Transport) -> None:
    async with streaming(transport) as stream:
        for pool in stream.final:
            pool.add_(1)
        await stream.compute(KvFrontier(1, 4, 6, 5, 5))
        for pool in stream.final:
            pool.sub_(1)
        fetched = await stream.finish(allocation=2)
        assert (fetched.streamed_bytes, fetched.streamed_s) == (0, 0.0)
        stream.check()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_stream_that_fails_is_pulled(transport: Transport, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of a part fail; or are altered on the way, where they are checked."""
    send = GlooGroup.send

    def corrupt(group: GlooGroup, data: torch.Tensor) -> object:
        data[3] ^= 1
        return send(group, data)

    def fail(*_: object) -> None:
        raise TransferError("no copy today")

    async with streaming(transport) as stream:
        await stream.compute(KvFrontier(1, 2, 4, 0, 5))
        with monkeypatch.context() as patch:
            patch.setattr(GlooGroup, "send", corrupt)
            patch.setattr(shared_memory_link, "copy_units", fail)
            await stream.prefill.holder.announce("r", 0, THEIRS, KvFrontier(1, 2, 4, 3, 5))
            await until(lambda: stream.receiver.links()[0].failures)
        fetched = await stream.finish()
        assert (fetched.streamed_bytes, fetched.streamed_s) == (0, 0.0)
        stream.check()


@pytest.mark.parametrize(
    "frontier",
    [
        KvFrontier(1, 2, 7, 5, 5),  # more blocks than the attempt has
        KvFrontier(1, 2, 6, 5, 6),  # more layers than the model has
        KvFrontier(1, 4, 2, 1, 5),
    ],
)
async def test_what_cannot_be_computed_is_not_read(frontier: KvFrontier) -> None:
    async with streaming(Transport.SHARED_MEMORY) as stream:
        await stream.prefill.holder.announce("r", 0, THEIRS, frontier)
        await until(lambda: stream.receiver.links() and stream.receiver.links()[0].failures)
        assert not any(bool(pool.any()) for pool in stream.pools)
        await stream.finish()
        stream.check()


async def test_the_source_sends_only_what_is_computed() -> None:
    """The reader believes that more is computed than the source knows of."""
    async with streaming(Transport.GLOO) as stream:
        readable = stream.prefill.holder.readable

        def less(request_id: str, epoch: int) -> object:
            stream.prefill.holder._computed["r", 0] = before
            return readable(request_id, epoch)

        await stream.compute(KvFrontier(1, 2, 4, 0, 5))
        before = stream.prefill.holder._computed["r", 0]
        stream.prefill.holder.readable = less  # type: ignore[assignment,method-assign]
        await stream.prefill.holder.announce("r", 0, THEIRS, KvFrontier(1, 4, 6, 0, 5))
        await until(lambda: stream.receiver.links()[0].failures)
        stream.prefill.holder.readable = readable  # type: ignore[method-assign]
        await stream.finish()
        stream.check()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_lost_lease_or_a_cancel_in_the_middle_takes_nothing(transport: Transport) -> None:
    async with streaming(transport) as stream:
        await stream.compute(KvFrontier(1, 4, 6, 5, 5))
        stream.prefill.holder.lease_lost = True
        with pytest.raises(StaleEpochError):
            await stream.finish()
    async with streaming(transport) as stream:
        await stream.compute(KvFrontier(1, 2, 4, 5, 5))
        stream.fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await stream.fetching
        before = [pool.clone() for pool in stream.pools]
        await stream.prefill.holder.announce("r", 0, THEIRS, KvFrontier(1, 4, 6, 5, 5))
        await asyncio.sleep(0.05)
        assert all(torch.equal(pool, then) for pool, then in zip(stream.pools, before, strict=True))
        assert stream.prefill.holder.acknowledged == []


async def test_a_prefill_that_dies_in_the_middle_is_gone() -> None:
    async with streaming(Transport.SHARED_MEMORY) as stream:
        await stream.compute(KvFrontier(1, 2, 4, 5, 5))
        await stream.prefill.stop()
        with pytest.raises(PeerGoneError):
            await stream.fetching
