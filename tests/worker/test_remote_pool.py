"""A pool that is reached over a connection holds and gives the same bytes as one in this process's memory."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.errors import TransferError
from tandem.core.kv_layout import KvLayout
from tandem.kv_transfer.blocks import PoolView
from tandem.kv_transfer.places import Places, put, take, unit_places
from tandem.kv_transfer.remote_pool import view_over
from tandem.kv_transfer.reshard import KvSlice
from tandem.worker.ranks.remote_pool import RankPool, serve_pool

LAYOUT = KvLayout(3, 5, 2, 8, 4, "bfloat16", "w")


def make_pool() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (LAYOUT.pool_bytes,), dtype=torch.uint8, generator=generator)


@contextmanager
def served(pool: torch.Tensor, wrap: Callable[[socket.socket], socket.socket] = lambda end: end) -> Iterator[RankPool]:
    ours, theirs = socket.socketpair()
    serving = threading.Thread(target=serve_pool, args=(theirs, pool, LAYOUT))
    serving.start()
    remote = RankPool(wrap(ours), 1)
    yield remote
    remote.close()
    ours.close()
    serving.join(10)
    assert not serving.is_alive()
    theirs.close()


def ranges(limit: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, limit - 1), st.integers(1, limit)).filter(lambda pair: pair[0] < pair[1])


@settings(max_examples=30)
@given(
    layers=ranges(LAYOUT.num_layers),
    heads=ranges(LAYOUT.num_kv_heads),
    units=st.sampled_from([1, 2, 8]),
    blocks=st.permutations(range(LAYOUT.num_blocks)),
    count=st.integers(1, LAYOUT.num_blocks),
    some=ranges(3),
)
def test_what_is_written_and_read(
    layers: tuple[int, int],
    heads: tuple[int, int],
    units: int,
    blocks: list[int],
    count: int,
    some: tuple[int, int],
) -> None:
    """Of any slice, whole blocks or units of them, and of some of the slice's layers."""
    kv_slice = KvSlice(*layers, *heads)
    places = unit_places(range(count * units), units, blocks, torch.device("cpu"))
    at = Places(places.blocks, None) if units == 1 else places
    which = slice(min(some[0], layers[1] - layers[0] - 1), min(some[1], layers[1] - layers[0]))
    here, there = make_pool(), make_pool()
    values = take(PoolView.over(here, LAYOUT, kv_slice, units).words[which], at).add(1)
    with served(there) as remote:
        view_over(remote, LAYOUT, kv_slice, units).put(which, at, values)
        put(PoolView.over(here, LAYOUT, kv_slice, units).words[which], at, values)
        assert torch.equal(here, there)
        outs = [
            torch.zeros(2 * (layers[1] - layers[0]) * count * LAYOUT.segment_bytes, dtype=torch.uint8) for _ in range(2)
        ]
        for pool, out in zip((here, remote), outs, strict=True):
            view_over(pool, LAYOUT).take_blocks(range(*layers), blocks[:count], out)
        assert torch.equal(*outs)


class _DamagingSocket:
    """Flips a bit of the last byte that is sent."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.recv_into = connection.recv_into
        self.close = connection.close

    def sendall(self, data: bytes | memoryview) -> None:
        damaged = bytearray(data)
        if damaged:
            damaged[-1] ^= 1
        self._connection.sendall(damaged)


def test_what_is_damaged_on_the_way_is_not_written() -> None:
    pool = make_pool()
    at = Places(torch.tensor([1, 2]), None)
    values = torch.ones(LAYOUT.num_layers, 2, 2, LAYOUT.num_kv_heads, 1, 8, dtype=torch.int64)
    with served(pool, _DamagingSocket) as remote, pytest.raises(TransferError, match="damaged"):  # type: ignore[arg-type]
        view_over(remote, LAYOUT).put(slice(0, LAYOUT.num_layers), at, values)
    assert torch.equal(pool, make_pool())


def test_fewer_bytes_than_were_asked_for_are_an_error() -> None:
    """The rank divides the model in another way than rank 0 believes."""
    ours, theirs = socket.socketpair()
    layout = replace(LAYOUT, num_kv_heads=1)
    serving = threading.Thread(target=serve_pool, args=(theirs, make_pool()[: layout.pool_bytes], layout))
    serving.start()
    remote = RankPool(ours, 1)
    with pytest.raises(TransferError, match="rank 1 sent"):
        remote.read(range(1), [0], torch.empty(2 * LAYOUT.segment_bytes, dtype=torch.uint8))
    remote.close()
    serving.join(10)
    assert not serving.is_alive()
    theirs.close()


def test_a_rank_that_is_gone_is_an_error() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    remote = RankPool(ours, 1)
    with pytest.raises(TransferError, match="rank 1"):
        remote.read(range(1), [0], torch.empty(2 * LAYOUT.segment_bytes, dtype=torch.uint8))
    remote.close()
