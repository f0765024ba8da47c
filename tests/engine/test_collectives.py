"""Collectives of ranks that are threads here: the kernels wait without the interpreter's lock.

tests/worker/test_ranks.py has ranks that are processes.
"""

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import FileStore

from tandem.core.parallel import ParallelShape
from tandem.engine.collectives.interface import Collectives, RankLostError
from tandem.engine.collectives.process_groups import ProcessGroupCollectives
from tandem.engine.collectives.shared_memory import SharedMemoryCollectives, SharedRegion
from tandem.engine.ops.native_library import NativeUnavailableError, load_native_library

MakeRank = Callable[[ParallelShape, int], Collectives]


@pytest.fixture
def regions() -> Iterator[Callable[[ParallelShape], SharedRegion]]:
    fds: dict[ParallelShape, int] = {}

    def region(shape: ParallelShape) -> SharedRegion:
        if shape not in fds:
            fds[shape] = SharedRegion.create(shape)
        return SharedRegion(fds[shape], shape)

    yield region
    for fd in fds.values():
        os.close(fd)


@pytest.fixture(params=["shared_memory", pytest.param("gloo", marks=pytest.mark.slow)])
def make_rank(
    request: pytest.FixtureRequest, regions: Callable[[ParallelShape], SharedRegion], tmp_path: Path
) -> MakeRank:
    lock = threading.Lock()

    def make(shape: ParallelShape, rank: int) -> Collectives:
        if request.param == "gloo":
            store = FileStore(str(tmp_path / str(shape)), shape.num_ranks)
            return ProcessGroupCollectives.connect(shape, rank, store, torch.device("cpu"), "127.0.0.1")
        try:
            with lock:
                return SharedMemoryCollectives(shape, rank, regions(shape), load_native_library())
        except NativeUnavailableError as error:
            pytest.skip(str(error))

    return make


def on_all_ranks(shape: ParallelShape, make_rank: MakeRank, work: Callable[[int, Collectives], object]) -> list[object]:
    """The results of `work(rank, collectives)`."""

    def run(rank: int) -> object:
        collectives = make_rank(shape, rank)
        result = work(rank, collectives)
        collectives.close()
        return result

    with ThreadPoolExecutor(shape.num_ranks) as pool:
        return list(pool.map(run, range(shape.num_ranks), timeout=60))


def test_sums_are_the_same_bits_on_all_ranks(make_rank: MakeRank) -> None:
    """Of sizes from one element to several slots, while ranks are late by chance."""
    sizes = [1, 7, 300, 262_144, 262_145, 600_000, 5, *[random.Random(1).randrange(1, 2000) for _ in range(60)]]

    def summand(rank: int, index: int) -> torch.Tensor:
        return torch.randn(sizes[index], generator=torch.Generator().manual_seed(100 * rank + index))

    def work(rank: int, collectives: Collectives) -> object:
        late = random.Random(rank)
        sums = []
        for index in range(len(sizes)):
            if late.random() < 0.1:
                time.sleep(late.random() * 0.003)
            sums.append(collectives.all_reduce(summand(rank, index)).clone())
        return sums

    shape = ParallelShape(3, 1)
    first, second, third = on_all_ranks(shape, make_rank, work)
    assert isinstance(first, list)
    for index, sum_of_first in enumerate(first):
        assert sum_of_first.equal(second[index])  # type: ignore[index]
        assert sum_of_first.equal(third[index])  # type: ignore[index]
        torch.testing.assert_close(sum_of_first, sum(summand(rank, index) for rank in range(3)))


def test_messages_arrive_in_order_and_whole(make_rank: MakeRank) -> None:
    """From each rank of a stage to the same rank of the next one, and from the last stage to rank 0; two of them are
    longer than a mailbox."""
    shapes = [(3, 5), (1, 1), (1100, 1024), (2000, 1024), (2, 9)]

    def work(rank: int, collectives: Collectives) -> object:
        received = []
        for index, size in enumerate(shapes):
            if rank >= 2:
                x = collectives.receive(rank - 2, size, torch.float32)
                collectives.send(0, x + rank)
            else:
                collectives.send(rank + 2, torch.full(size, float(index)))
            if rank == 0:
                received += [collectives.receive(other, size, torch.float32) for other in (2, 3)]
        return received

    received = on_all_ranks(ParallelShape(2, 2), make_rank, work)[0]
    assert isinstance(received, list)
    assert [(x.unique().tolist(), tuple(x.shape)) for x in received] == [
        ([float(index + rank)], size) for index, size in enumerate(shapes) for rank in (2, 3)
    ]


def test_an_abort_ends_a_wait(regions: Callable[[ParallelShape], SharedRegion]) -> None:
    shape = ParallelShape(2, 1)
    try:
        rank = SharedMemoryCollectives(shape, 0, regions(shape), load_native_library())
    except NativeUnavailableError as error:
        pytest.skip(str(error))
    timer = threading.Timer(0.1, regions(shape).abort)
    timer.start()
    began_s = time.monotonic()
    with pytest.raises(RankLostError, match="gone"):
        rank.all_reduce(torch.ones(3))
    assert time.monotonic() - began_s < 10.0
    timer.join()


def test_an_empty_sum_waits_for_all_ranks(make_rank: MakeRank) -> None:
    """What a rank has written before is then visible to the others."""
    written: list[int] = []

    def work(rank: int, collectives: Collectives) -> object:
        seen = []
        for number in range(20):
            if rank == 1:
                time.sleep(0.002)
                written.append(number)
            assert collectives.all_reduce(torch.empty(0, 8)).shape == (0, 8)
            seen.append(len(written))
            collectives.all_reduce(torch.ones(3))
        return seen

    first, _ = on_all_ranks(ParallelShape(2), make_rank, work)
    assert first == list(range(1, 21))
