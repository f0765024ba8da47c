"""Views over a pool and copies between pools, against plain indexing."""

import asyncio
import os
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.errors import TransferError
from tandem.core.kv_frontier import TransferChunk
from tandem.core.kv_layout import KvLayout
from tandem.kv_transfer import blocks
from tandem.kv_transfer.blocks import LeavingBlocks, PoolView, copy_blocks, split_transfer
from tandem.kv_transfer.fence import WriteFence
from tandem.kv_transfer.reshard import KvSlice

block_lists = st.integers(1, 12).flatmap(
    lambda count: st.tuples(*[st.permutations(range(16)).map(lambda ids, count=count: ids[:count]) for _ in range(2)])
)


@given(st.integers(0, 5), st.integers(0, 7), st.integers(1, 64), st.integers(1, 1000))
def test_chunks_cover_the_transfer_once_and_stay_small(layers: int, count: int, row: int, limit: int) -> None:
    covered = torch.zeros(layers, count, dtype=torch.int32)
    for chunk in split_transfer(TransferChunk(range(layers), range(count)), row, limit):
        area = covered[chunk.layers.start : chunk.layers.stop, chunk.blocks.start : chunk.blocks.stop]
        assert area.numel() > 0
        assert area.numel() * row <= max(limit, row)
        area.add_(1)
    assert bool((covered == 1).all())


def pools(layout: KvLayout) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.randint(0, 256, (layout.pool_bytes,), dtype=torch.uint8)
    return source, torch.zeros_like(source)


def shaped(pool: torch.Tensor, layout: KvLayout) -> torch.Tensor:
    return pool.view(layout.num_layers, 2, layout.num_blocks, layout.num_kv_heads, -1)


layouts = st.builds(
    KvLayout,
    num_layers=st.integers(1, 4),
    num_blocks=st.just(16),
    num_kv_heads=st.integers(1, 4),
    block_size=st.sampled_from([1, 3, 16]),
    head_dim=st.sampled_from([1, 8, 64]),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    weights_hash=st.just("w"),
)


@settings(deadline=None, max_examples=50)
@given(layouts, block_lists, st.data())
def test_a_slice_is_copied_and_nothing_else(
    layout: KvLayout, lists: tuple[list[int], list[int]], data: st.DataObject
) -> None:
    layer = data.draw(st.integers(0, layout.num_layers - 1))
    head = data.draw(st.integers(0, layout.num_kv_heads - 1))
    kv_slice = KvSlice(
        layer,
        data.draw(st.integers(layer + 1, layout.num_layers)),
        head,
        data.draw(st.integers(head + 1, layout.num_kv_heads)),
    )
    source, destination = pools(layout)
    expected = destination.clone()
    area = (slice(kv_slice.layer_begin, kv_slice.layer_end), slice(None))
    heads = slice(kv_slice.head_begin, kv_slice.head_end)
    for from_id, to_id in zip(*lists, strict=True):
        shaped(expected, layout)[(*area, to_id, heads)] = shaped(source, layout)[(*area, from_id, heads)]

    from_view, to_view = (PoolView.over(pool, layout, kv_slice) for pool in (source, destination))
    copy_blocks(from_view.block_views(), lists[0], to_view.block_views(), lists[1], WriteFence())
    assert torch.equal(destination, expected)


def test_big_blocks_are_cut_into_views() -> None:
    for num_layers, heads, block_size in ((24, 2, 16), (1, 1, 64), (2, 8, 64)):
        layout = KvLayout(num_layers, 8, heads, block_size, 64, "bfloat16", "w")
        source, destination = pools(layout)
        kv_slice = KvSlice(0, num_layers, 0, heads)
        from_view, to_view = (PoolView.over(pool, layout, kv_slice) for pool in (source, destination))
        copy_blocks(from_view.block_views(), [1, 2, 5], to_view.block_views(), [0, 7, 3], WriteFence())
        assert torch.equal(shaped(destination, layout)[:, :, [0, 7, 3]], shaped(source, layout)[:, :, [1, 2, 5]])


def test_checksum_sees_one_flipped_bit() -> None:
    layout = KvLayout(2, 16, 2, 4, 8, "bfloat16", "w")
    source, _ = pools(layout)
    leaving = LeavingBlocks(PoolView.over(source, layout), layout, [1, 2, 3], 10, 100)  # the last block has two tokens
    before = leaving.checksum()
    source[(2 * layout.num_blocks + 2) * layout.segment_bytes + 5] ^= 1
    assert leaving.checksum() != before


def test_checksum_leaves_out_what_comes_after_the_last_token() -> None:
    layout = KvLayout(2, 16, 2, 4, 8, "bfloat16", "w")
    source, _ = pools(layout)
    view = PoolView.over(source, layout)
    leaving, longer = (LeavingBlocks(view, layout, [1, 2, 3], num_tokens, 100) for num_tokens in (10, 11))
    before = leaving.checksum()
    shaped(source, layout).view(2, 2, 16, 2, 4, -1)[:, :, 3, :, 2:] ^= 1
    assert leaving.checksum() == before
    assert longer.checksum() != before


async def test_nothing_is_written_after_the_fence_is_closed() -> None:
    layout = KvLayout(2, 16, 2, 4, 8, "bfloat16", "w")
    source, destination = pools(layout)
    from_view, to_view = (PoolView.over(pool, layout, KvSlice(0, 2, 0, 2)) for pool in (source, destination))
    fence = WriteFence()
    await fence.close()
    with pytest.raises(TransferError):
        copy_blocks(from_view.block_views(), [1], to_view.block_views(), [2], fence)
    assert not destination.any()


@pytest.mark.parametrize("cancelled", [False, True])
async def test_closing_a_fence_waits_for_the_write_under_way_and_the_event_loop_goes_on(cancelled: bool) -> None:
    fence, entered, leave = WriteFence(), threading.Event(), threading.Event()
    left: list[bool] = []

    def write() -> None:
        with fence.writing():
            entered.set()
            left.append(leave.wait(10.0))

    thread = threading.Thread(target=write)
    thread.start()
    assert await asyncio.to_thread(entered.wait, 5.0)
    closing = asyncio.create_task(fence.close())
    for _ in range(3):  # the loop turns meanwhile
        await asyncio.sleep(0.01)
        if cancelled:
            closing.cancel()
    assert not closing.done()
    leave.set()
    (outcome,) = await asyncio.gather(closing, return_exceptions=True)
    assert isinstance(outcome, asyncio.CancelledError) == cancelled
    assert left == [True]
    thread.join()


def test_a_copy_stays_in_its_thread() -> None:
    """torch would spread larger views over threads that decode's steps need."""
    layout = KvLayout(32, 4, 8, 16, 128, "bfloat16", "w")
    source, destination = pools(layout)
    from_view, to_view = (PoolView.over(pool, layout, KvSlice(0, 32, 0, 8)) for pool in (source, destination))
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        threads: list[int] = []

        def copy() -> None:
            copy_blocks(from_view.block_views(), [0, 1, 2], to_view.block_views(), [3, 2, 1], WriteFence())
            threads.append(len(os.listdir("/proc/self/task")))

        count = len(os.listdir("/proc/self/task"))
        thread = threading.Thread(target=copy)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert threads == [count + 1]
    assert blocks.MAX_VIEW_WORDS < 32768
