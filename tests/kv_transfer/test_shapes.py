"""Decode fetches from prefill over a real control channel, and the two have other ranks and block sizes."""

import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import torch

from tandem.core.errors import IncompatiblePeerError, StaleEpochError, TransferError
from tandem.core.kv_layout import KvLayout
from tandem.core.transfer import LinkOffer, LinkReply, Transport
from tandem.kv_transfer import shared_memory_link
from tandem.kv_transfer.config import LinkConfig
from tandem.kv_transfer.process_groups import GlooGroup
from tandem.kv_transfer.receiver import FetchResult, KvReceiver
from tests.kv_transfer.holder import Prefill, serve_prefill, tokens
from tests.kv_transfer.shapes import make_replicas_equal, shaped, tokens_of

TRANSPORTS = (Transport.SHARED_MEMORY, Transport.GLOO)
NUM_BLOCKS = 32


def layout(block_size: int = 8, **division: object) -> KvLayout:
    return KvLayout(5, NUM_BLOCKS, 2, block_size, 8, "bfloat16", "w", **division)  # type: ignore[arg-type]


PAIRS = [
    (layout(tp=2), layout()),
    (layout(), layout(tp=2, layers_per_stage=(3, 2))),
    (layout(tp=4), layout(tp=3)),  # heads on several ranks, on both sides
    (layout(16, layers_per_stage=(1, 4)), layout(4, tp=2)),
    (layout(6, tp=2), layout(16, layers_per_stage=(2, 2, 1))),
]


@asynccontextmanager
async def fetching(
    source: KvLayout, destination: KvLayout, **options: object
) -> AsyncIterator[tuple[Prefill, KvReceiver, list[torch.Tensor]]]:
    """Served prefill side, receiver, and the receiver's pools. Many attempts of request "r" are finished."""
    pools = [
        torch.zeros(destination.pool_of(rank).pool_bytes, dtype=torch.uint8) for rank in range(destination.num_ranks)
    ]
    options = {"link_config": LinkConfig(stall_s=2.0), **options}
    async with serve_prefill(source) as prefill:
        make_replicas_equal([pool.tensor for pool in prefill.pools], source)
        receiver = KvReceiver(destination, pools, "decode-0", **options)  # type: ignore[arg-type]
        try:
            yield prefill, receiver, pools
        finally:
            await receiver.close()


async def fetch(prefill: Prefill, receiver: KvReceiver, theirs: list[int], ours: list[int], epoch: int) -> FetchResult:
    prefill.holder.finish("r", epoch, theirs)
    return await receiver.fetch(
        prefill.peer, "r", epoch, tokens(len(theirs), prefill.layout), ours, time.monotonic() + 20.0
    )


@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("pair", PAIRS, ids=range(len(PAIRS)))
async def test_kv_arrives(pair: tuple[KvLayout, KvLayout], transport: Transport, checksum: bool) -> None:
    source, destination = pair
    rng = random.Random(5)
    async with fetching(source, destination, transport=transport, checksum=checksum) as (prefill, receiver, pools):
        for epoch in range(4):
            theirs = rng.sample(range(NUM_BLOCKS), rng.randint(1, 7))
            num_tokens = len(tokens(len(theirs), source))
            ours = rng.sample(range(NUM_BLOCKS), destination.blocks_for(num_tokens))
            fetched = await fetch(prefill, receiver, theirs, ours, epoch)
            expected = tokens_of([pool.tensor for pool in prefill.pools], source, theirs, num_tokens)
            assert torch.equal(tokens_of(pools, destination, ours, num_tokens), expected)
            assert fetched.transport is transport
        assert prefill.holder.acknowledged == [("r", epoch) for epoch in range(4)]


async def test_gloo_carries_replicas_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two heads on four ranks of the source, and on four of the destination."""
    sent: list[int] = []
    send = GlooGroup.send

    def counted(group: GlooGroup, data: torch.Tensor) -> object:
        sent.append(len(data))
        return send(group, data)

    source, destination = layout(tp=4), layout(tp=4)
    async with fetching(source, destination, transport=Transport.GLOO) as (prefill, receiver, _):
        await fetch(prefill, receiver, [1], [1], 0)  # makes the link
        monkeypatch.setattr(GlooGroup, "send", counted)
        await fetch(prefill, receiver, [1, 2, 3], [4, 5, 6], 1)
    assert sum(sent) == 3 * source.block_bytes


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_byte_corrupted_on_the_way_from_or_to_any_rank_is_found(
    transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, destination = layout(tp=2), layout(4, layers_per_stage=(4, 1))
    send, copy, count = GlooGroup.send, shared_memory_link.copy_units, 0

    async with fetching(source, destination, transport=transport, checksum=True) as (prefill, receiver, pools):
        await fetch(prefill, receiver, [1], [1, 2], 0)

        def corrupt_send(group: GlooGroup, data: torch.Tensor) -> object:
            nonlocal count
            count += 1
            if count == 2:  # of rank 1
                data[7] ^= 1
            return send(group, data)

        def corrupt_copy(*arguments: object) -> None:
            nonlocal count
            copy(*arguments)  # type: ignore[arg-type]
            count += 1
            if count == 4:  # the last one: from rank 1 to rank 1
                shaped(pools[1], destination, 1)[0, 0, 5, 1, 0, 0] ^= 1

        with monkeypatch.context() as patch:
            patch.setattr(GlooGroup, "send", corrupt_send)
            patch.setattr(shared_memory_link, "copy_units", corrupt_copy)
            with pytest.raises(TransferError):
                await fetch(prefill, receiver, [3], [5, 6], 1)
        assert prefill.holder.acknowledged == [("r", 0)]
        await fetch(prefill, receiver, [3], [5, 6], 2)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_kv_whose_lease_ended_is_not_taken(transport: Transport) -> None:
    async with fetching(layout(tp=2), layout(16), transport=transport) as (prefill, receiver, _):
        prefill.holder.lease_lost = True
        with pytest.raises(StaleEpochError):
            await fetch(prefill, receiver, [3, 4], [1], 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"layers_per_stage": (3, 3)},
        {"layers_per_stage": (5, 0)},
        {"tp": 0},
        {"tp": 3},
        {"tp": 1 << 30},
        {"block_size": 0},
        {"block_size": 1 << 30},
        {"num_blocks": 0},
        {"nonces": (b"one",)},
    ],
    ids=str,
)
async def test_a_source_that_does_not_fit_the_model_is_refused_with_a_sentence(
    changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with fetching(layout(tp=2), layout(), transport=Transport.SHARED_MEMORY) as (prefill, receiver, pools):
        link = prefill.sender.link

        async def lie(offer: LinkOffer) -> LinkReply:
            return replace(await link(offer), **changes)  # type: ignore[arg-type]

        monkeypatch.setattr(prefill.sender, "link", lie)
        with pytest.raises(IncompatiblePeerError, match="the prefill worker's"):
            await fetch(prefill, receiver, [3], [1], 0)
        assert not any(pool.any() for pool in pools)
        assert prefill.holder.acknowledged == []


async def test_a_manifest_of_other_blocks_is_refused() -> None:
    async with fetching(layout(tp=2), layout(16)) as (prefill, receiver, pools):
        prefill.holder.finish("r", 0, [3, 4])
        prefill.holder.alter("r", 0, {"block_size": 16, "block_ids": (3,)})
        with pytest.raises(TransferError, match="another size"):
            await receiver.fetch(prefill.peer, "r", 0, tokens(2, prefill.layout), [1], time.monotonic() + 20.0)
        assert not any(pool.any() for pool in pools)
