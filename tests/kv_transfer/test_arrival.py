"""KV of one instance arrives in the pools of another, whatever the ranks and block sizes, by every way of bytes."""

import ctypes
import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.errors import TransferError
from tandem.core.kv_codec import KvCodec
from tandem.core.kv_layout import KvLayout
from tandem.kv_transfer.arrival import Offsets, OwnPools, PairPlan, copy_by_pieces, copy_units
from tandem.kv_transfer.block_coder import BlockCoder
from tandem.kv_transfer.blocks import LeavingBlocks, PoolView, copy_blocks
from tandem.kv_transfer.fence import WriteFence
from tests.kv_transfer.shapes import coded, make_replicas_equal, random_floats, random_pools, shaped, tokens_of

NUM_BLOCKS = 24


@st.composite
def layouts(draw: st.DrawFn) -> tuple[KvLayout, KvLayout]:
    """Two of one model."""
    heads, head_dim = draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.sampled_from([1, 2, 4]))
    dtype = draw(st.sampled_from(["bfloat16", "float32"]))

    def one() -> KvLayout:
        stages = tuple(draw(st.permutations(draw(st.sampled_from([(5,), (4, 1), (2, 2, 1), (1, 1, 2, 1)])))))
        size = draw(st.sampled_from([1, 3, 8, 16, 32, 64]))
        tp = draw(st.sampled_from([1, 2, 3, 4, 8]))
        return KvLayout(5, NUM_BLOCKS, heads, size, head_dim, dtype, "w", tp=tp, layers_per_stage=stages)

    return one(), one()


def copy_pieces(target: int, target_offsets: Offsets, source: int, source_offsets: Offsets, piece_bytes: int) -> None:
    """One by one."""
    for to_offset, from_offset in zip(target_offsets.tolist(), source_offsets.tolist(), strict=True):
        ctypes.memmove(target + to_offset, source + from_offset, piece_bytes)


@dataclass
class Transfer:
    """One of `num_tokens` tokens, with pools full of random bytes on both sides."""

    source: KvLayout
    destination: KvLayout
    num_tokens: int
    codec: KvCodec = KvCodec.NONE

    def __post_init__(self) -> None:
        rng = random.Random(self.num_tokens)
        make_pools = random_pools if self.codec is KvCodec.NONE else random_floats
        self.theirs, self.ours = make_pools(self.source, 1), make_pools(self.destination, 2)
        make_replicas_equal(self.theirs, self.source)
        make_replicas_equal(self.ours, self.destination)
        self.their_ids = rng.sample(range(NUM_BLOCKS), self.source.blocks_for(self.num_tokens))
        self.our_ids = rng.sample(range(NUM_BLOCKS), self.destination.blocks_for(self.num_tokens))
        self.before = [pool.clone() for pool in self.ours]
        self.plan = PairPlan.make(self.source, OwnPools(self.destination, self.ours), self.codec)

    def copy(self, *, by_pieces: bool = False) -> None:
        """As over shared memory."""
        resharding = self.plan.resharding
        for read in resharding.reads:
            for write in read.writes:
                pool, layout = self.theirs[read.rank], self.source.pool_of(read.rank)
                view = PoolView.over(pool, layout, write.source, resharding.source_units)
                target = self.plan.pools.view(write.rank, write.destination, resharding.destination_units)
                units = range(resharding.num_units(self.num_tokens))
                if by_pieces:
                    copy_by_pieces(
                        *(copy_pieces, view.words, self.their_ids, target.words, self.our_ids),
                        *(resharding, units, WriteFence()),
                    )
                    continue
                if resharding.copies_whole_blocks:
                    ours = self.plan.pools.block_views(write.rank, write.destination)
                    copy_blocks(view.block_views(), self.their_ids, ours, self.our_ids, WriteFence())
                else:
                    copy_units(
                        *(view.words, self.their_ids, target.words, self.our_ids),
                        *(resharding, units, WriteFence()),
                    )

    def send(self, max_chunk_bytes: int) -> None:
        """As over a process group."""
        for arriving in self.plan.arriving(self.our_ids, self.num_tokens, max_chunk_bytes):
            leaving = self.leaving(arriving.read.rank, max_chunk_bytes)
            assert leaving.chunks == arriving.chunks
            assert arriving.wire_bytes == leaving.wire_bytes
            staging, scratch, received = (torch.empty(leaving.staging_bytes, dtype=torch.uint8) for _ in range(3))
            for chunk in leaving.chunks:
                sent = leaving.pack(chunk, staging, scratch)
                assert sent.nbytes == leaving.sent_bytes(chunk)
                arriving.scatter(chunk, arriving.unpack(chunk, sent, received))

    def leaving(self, rank: int, max_chunk_bytes: int) -> LeavingBlocks:
        layout = self.source.pool_of(rank)
        coder = None if self.codec is KvCodec.NONE else BlockCoder(self.codec, layout)
        ids, num_tokens = self.their_ids, self.num_tokens
        source = PoolView.over(self.theirs[rank], layout)
        return LeavingBlocks(source, layout, ids, num_tokens, max_chunk_bytes, coder=coder)

    def checksums(self) -> list[tuple[int, int]]:
        """Of what the source has and of what has arrived, by rank of the source."""
        return [
            (self.leaving(arriving.read.rank, 500).checksum(), arriving.checksum())
            for arriving in self.plan.arriving(self.our_ids, self.num_tokens, 500)
        ]

    def check(self) -> None:
        sent = self.theirs
        if self.codec is not KvCodec.NONE:
            sent = coded(sent, self.source, self.their_ids, self.num_tokens, self.codec)
        expected = tokens_of(sent, self.source, self.their_ids, self.num_tokens)
        assert torch.equal(tokens_of(self.ours, self.destination, self.our_ids, self.num_tokens), expected)
        others = [block for block in range(NUM_BLOCKS) if block not in self.our_ids]
        for rank, (pool, before) in enumerate(zip(self.ours, self.before, strict=True)):
            now, then = (shaped(each, self.destination, rank)[:, :, others] for each in (pool, before))
            assert torch.equal(now, then), "blocks of other requests"
        if self.codec is KvCodec.NONE:
            assert all(theirs == ours for theirs, ours in self.checksums())


@settings(deadline=None, max_examples=60)
@given(layouts(), st.data())
def test_kv_arrives_and_other_blocks_stay(both: tuple[KvLayout, KvLayout], data: st.DataObject) -> None:
    most = NUM_BLOCKS * min(layout.block_size for layout in both)
    transfer = Transfer(*both, num_tokens=data.draw(st.integers(1, most)))
    transfer.copy()
    transfer.check()
    for pool, before in zip(transfer.ours, transfer.before, strict=True):
        pool.copy_(before)
    transfer.copy(by_pieces=True)
    transfer.check()
    for pool, before in zip(transfer.ours, transfer.before, strict=True):
        pool.copy_(before)
    transfer.send(data.draw(st.integers(1, 5000)))
    transfer.check()


@settings(deadline=None, max_examples=25)
@given(layouts(), st.sampled_from([KvCodec.FP8, KvCodec.INT8, KvCodec.INT4]), st.data())
def test_coded_kv_arrives_the_same_however_it_is_divided(
    both: tuple[KvLayout, KvLayout], codec: KvCodec, data: st.DataObject
) -> None:
    """Each block is coded by itself: ranks, other shapes and chunks do not change the result."""
    most = NUM_BLOCKS * min(layout.block_size for layout in both)
    transfer = Transfer(*both, num_tokens=data.draw(st.integers(1, most)), codec=codec)
    transfer.send(data.draw(st.integers(1, 5000)))
    transfer.check()


def layout_of(block_size: int = 16, **division: object) -> KvLayout:
    return KvLayout(4, NUM_BLOCKS, 2, block_size, 4, "bfloat16", "w", **division)  # type: ignore[arg-type]


SHAPES = (
    layout_of(),
    layout_of(tp=2),
    layout_of(tp=4),  # replicas
    layout_of(layers_per_stage=(3, 1)),
    layout_of(32, tp=2, layers_per_stage=(1, 3)),
)


@pytest.mark.parametrize("destination", SHAPES, ids=range(len(SHAPES)))
def test_a_flipped_bit_on_any_rank_changes_the_checksum(destination: KvLayout) -> None:
    transfer = Transfer(layout_of(tp=2), destination, num_tokens=40)
    transfer.copy()
    transfer.check()
    for rank, pool in enumerate(transfer.ours):
        shaped(pool, destination, rank)[-1, 1, transfer.our_ids[0], -1, 3, -1] ^= 1
        try:
            found = any(theirs != ours for theirs, ours in transfer.checksums())
        except TransferError:  # the ranks that hold the head differ
            found = True
        assert found, rank
        shaped(pool, destination, rank)[-1, 1, transfer.our_ids[0], -1, 3, -1] ^= 1
    transfer.check()
