"""Views over a pool and copies between pools, against plain indexing."""

import os
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.errors import TransferError
from tandem.core.kv_layout import KvLayout
from tandem.core.transfer import Portion
from tandem.kv_transfer import blocks
from tandem.kv_transfer.blocks import Gate, PoolView, copy_blocks, gather_checksum, windows

block_lists = st.integers(1, 12).flatmap(
    lambda count: st.tuples(*[st.permutations(range(16)).map(lambda ids, count=count: ids[:count]) for _ in range(2)])
)


@given(st.integers(0, 5), st.integers(0, 7), st.integers(1, 64), st.integers(1, 1000))
def test_windows_cover_the_shipment_once_and_stay_small(layers: int, count: int, row: int, limit: int) -> None:
    covered = torch.zeros(layers, count, dtype=torch.int32)
    for window in windows(layers, count, row, limit):
        area = covered[window.layer_begin : window.layer_end, window.block_begin : window.block_end]
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
def test_a_portion_is_copied_and_nothing_else(
    layout: KvLayout, lists: tuple[list[int], list[int]], data: st.DataObject
) -> None:
    layer = data.draw(st.integers(0, layout.num_layers - 1))
    head = data.draw(st.integers(0, layout.num_kv_heads - 1))
    portion = Portion(
        layer,
        data.draw(st.integers(layer + 1, layout.num_layers)),
        head,
        data.draw(st.integers(head + 1, layout.num_kv_heads)),
    )
    source, destination = pools(layout)
    expected = destination.clone()
    area = (slice(portion.layer_begin, portion.layer_end), slice(None))
    heads = slice(portion.head_begin, portion.head_end)
    for from_id, to_id in zip(*lists, strict=True):
        shaped(expected, layout)[(*area, to_id, heads)] = shaped(source, layout)[(*area, from_id, heads)]

    from_view, to_view = (PoolView.over(pool, layout, portion) for pool in (source, destination))
    copy_blocks(from_view.pieces(), lists[0], to_view.pieces(), lists[1], Gate())
    assert torch.equal(destination, expected)

    destination.zero_()  # the same by way of a staging buffer
    plan = windows(portion.num_layers, len(lists[0]), from_view.layer_block_bytes, data.draw(st.integers(1, 4096)))
    staging = torch.empty(max(map(from_view.window_bytes, plan)), dtype=torch.uint8)
    for window in plan:
        from_view.gather(window, torch.tensor(lists[0]), staging)
        to_view.scatter(window, torch.tensor(lists[1]), staging)
    assert torch.equal(destination, expected)
    assert gather_checksum(from_view, lists[0], plan) == gather_checksum(to_view, lists[1], plan)


def test_big_blocks_are_cut_into_pieces() -> None:
    for num_layers, heads, block_size in ((24, 2, 16), (1, 1, 64), (2, 8, 64)):
        layout = KvLayout(num_layers, 8, heads, block_size, 64, "bfloat16", "w")
        source, destination = pools(layout)
        portion = Portion(0, num_layers, 0, heads)
        from_view, to_view = (PoolView.over(pool, layout, portion) for pool in (source, destination))
        copy_blocks(from_view.pieces(), [1, 2, 5], to_view.pieces(), [0, 7, 3], Gate())
        assert torch.equal(shaped(destination, layout)[:, :, [0, 7, 3]], shaped(source, layout)[:, :, [1, 2, 5]])


def test_checksum_sees_one_flipped_bit() -> None:
    layout = KvLayout(2, 16, 2, 4, 8, "bfloat16", "w")
    source, _ = pools(layout)
    view = PoolView.over(source, layout, Portion(0, 2, 0, 2))
    plan = windows(2, 3, view.layer_block_bytes, 100)
    before = gather_checksum(view, [1, 2, 3], plan)
    source[(2 * layout.num_blocks + 2) * layout.segment_bytes + 5] ^= 1
    assert gather_checksum(view, [1, 2, 3], plan) != before


def test_nothing_is_written_behind_a_closed_gate() -> None:
    layout = KvLayout(2, 16, 2, 4, 8, "bfloat16", "w")
    source, destination = pools(layout)
    from_view, to_view = (PoolView.over(pool, layout, Portion(0, 2, 0, 2)) for pool in (source, destination))
    gate = Gate()
    gate.close()
    with pytest.raises(TransferError):
        copy_blocks(from_view.pieces(), [1], to_view.pieces(), [2], gate)
    assert not destination.any()


def test_closing_a_gate_waits_for_the_chunk_under_way() -> None:
    gate, entered, leave, closed = Gate(), threading.Event(), threading.Event(), threading.Event()

    def copy() -> None:
        with gate.open():
            entered.set()
            leave.wait(5.0)

    def close() -> None:
        gate.close()
        closed.set()

    threads = [threading.Thread(target=copy), threading.Thread(target=close)]
    threads[0].start()
    assert entered.wait(5.0)
    threads[1].start()
    assert not closed.wait(0.05)
    leave.set()
    assert closed.wait(5.0)
    for thread in threads:
        thread.join()


def test_a_copy_stays_in_its_thread() -> None:
    """torch would spread larger pieces over threads that decode's steps need."""
    layout = KvLayout(32, 4, 8, 16, 128, "bfloat16", "w")
    source, destination = pools(layout)
    from_view, to_view = (PoolView.over(pool, layout, Portion(0, 32, 0, 8)) for pool in (source, destination))
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        threads: list[int] = []

        def copy() -> None:
            copy_blocks(from_view.pieces(), [0, 1, 2], to_view.pieces(), [3, 2, 1], Gate())
            threads.append(len(os.listdir("/proc/self/task")))

        count = len(os.listdir("/proc/self/task"))
        thread = threading.Thread(target=copy)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert threads == [count + 1]
    assert blocks._MAX_PIECE_WORDS < 32768
