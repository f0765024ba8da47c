"""Tandem's transports, a plain copy, and the engines that users would otherwise choose, for the same bytes in turns."""

import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from bench.kv_transfer.engines import ENGINES, OPERATIONS, running
from bench.kv_transfer.measure import CPU_TRANSPORTS, fetch_s, served_source
from bench.kv_transfer.source import block_ids_of
from tandem.core.kv_frontier import TransferChunk
from tandem.core.kv_layout import KvLayout
from tandem.engine.ops.piece_copy import native_copy_pieces
from tandem.kv_transfer.arrival import OwnPools
from tandem.kv_transfer.config import LinkConfig
from tandem.kv_transfer.fence import WriteFence
from tandem.kv_transfer.link_totals import LinkTotals
from tandem.kv_transfer.pool import SharedPool
from tandem.kv_transfer.receive_links import ReceiveLinks
from tandem.kv_transfer.receiver import KvReceiver
from tandem.kv_transfer.shared_memory_link import SharedMemoryLink
from tandem.wire.transfer import KvTransferClient

_POOL_BYTES = 512 << 20
PLAIN = "plain copy"
COPY = "shared memory, copy"  # without control: what the engines are compared with
_HANDOVERS = {transport: f"{transport.value.replace('_', ' ')}, hand-over" for transport in CPU_TRANSPORTS}
_BLOCKS = {
    8: (28, 2, 128, 16),
    64: (4, 8, 256, 16),
    256: (2, 16, 256, 32),
}  # layers, heads, head size, slots of a block


@dataclass(frozen=True, slots=True)
class TransferCell:
    """`way` for `num_bytes` in pieces of `piece_bytes`: seconds of each repetition."""

    way: str
    num_bytes: int
    piece_bytes: int
    is_scattered: bool
    seconds: tuple[float, ...]

    @property
    def gigabytes_per_s(self) -> float:
        return self.num_bytes / median(self.seconds) / 1e9


def layout_of(piece_kib: int) -> KvLayout:
    """Blocks whose contiguous pieces (K or V of one layer) have that size, in a pool of `_POOL_BYTES`."""
    layers, heads, head_dim, block_size = _BLOCKS[piece_kib]
    block_bytes = KvLayout(layers, 1, heads, block_size, head_dim, "bfloat16", "bench").block_bytes
    return KvLayout(layers, _POOL_BYTES // block_bytes, heads, block_size, head_dim, "bfloat16", "bench")


PIECES_KIB = tuple(_BLOCKS)


async def compare(
    piece_kib: int, megabytes: Sequence[int], repetitions: int, engines_python: Path | None
) -> list[TransferCell]:
    """All ways take turns, `repetitions` times for each size; half of the cells in one run of blocks, half scattered.
    `engines_python`: an interpreter that has the engines; None: without them. Raises MeasurementError."""
    torch.set_num_threads(1)
    layout = layout_of(piece_kib)
    assert layout.segment_bytes == piece_kib << 10
    pool = SharedPool.create(layout.pool_bytes)
    seconds: defaultdict[tuple[str, int, bool], list[float]] = defaultdict(list)
    async with AsyncExitStack() as stack:
        source = await stack.enter_async_context(served_source(layout))
        ways = await _own_ways(stack, layout, pool, source)
        engines = []
        if engines_python is not None:
            for name in ENGINES:
                engines.append(await stack.enter_async_context(running(name, engines_python, layout.pool_bytes)))
        for size in megabytes:
            num_blocks = (size << 20) // layout.block_bytes
            plain_from, plain_to = (torch.ones(size << 20, dtype=torch.uint8) for _ in range(2))
            for i in range(repetitions + 1):
                for is_scattered in (False, True):
                    seeds = (2 * i + 1, 2 * i + 2) if is_scattered else (0, 0)

                    def add(way: str, took_s: float, *, at: tuple[int, bool] = (size, is_scattered)) -> None:
                        seconds[way, *at].append(took_s)

                    started_s = time.perf_counter()
                    plain_to.copy_(plain_from)
                    add(PLAIN, time.perf_counter() - started_s)
                    for way in ways:
                        add(way.name, await way.seconds(num_blocks, seeds))
                    theirs, ours = (_pieces(block_ids_of(seed, num_blocks, layout), layout) for seed in seeds)
                    for engine in engines:
                        for operation in OPERATIONS:
                            took_s = await engine.transfer_s(operation, ours, theirs, layout.segment_bytes)
                            add(f"{engine.name}, {operation}", took_s)
        pool.close()
    return [
        TransferCell(
            way, size << 20, layout.segment_bytes, is_scattered, tuple(times[1:])
        )  # the first one is a warm-up
        for (way, size, is_scattered), times in seconds.items()
    ]


def _pieces(block_ids: Sequence[int], layout: KvLayout) -> list[int]:
    """Offsets in the pool: each block has one piece for K and one for V in each layer."""
    rows = range(2 * layout.num_layers)
    return [(row * layout.num_blocks + block) * layout.segment_bytes for row in rows for block in block_ids]


class _Handover:
    """Everything that a decode instance waits for after the prefill."""

    def __init__(self, name: str, layout: KvLayout, source: KvTransferClient, receiver: KvReceiver) -> None:
        self.name = name
        self._layout = layout
        self._source = source
        self._receiver = receiver

    async def seconds(self, num_blocks: int, seeds: tuple[int, int]) -> float:
        return await fetch_s(self._receiver, self._source, self._layout, num_blocks, seeds)


class _SharedMemoryCopy:
    """The bytes alone."""

    name = COPY

    def __init__(self, layout: KvLayout, end: SharedMemoryLink) -> None:
        self._layout = layout
        self._end = end

    async def seconds(self, num_blocks: int, seeds: tuple[int, int]) -> float:
        theirs, ours = (block_ids_of(seed, num_blocks, self._layout) for seed in seeds)
        whole = TransferChunk(range(self._layout.num_layers), range(num_blocks))
        started_s = time.perf_counter()
        await self._end.copy(theirs, ours, num_blocks * self._layout.block_size, [whole], WriteFence())
        return time.perf_counter() - started_s


async def _own_ways(
    stack: AsyncExitStack, layout: KvLayout, pool: SharedPool, source: KvTransferClient
) -> list[_Handover | _SharedMemoryCopy]:
    copy_pieces = native_copy_pieces()
    links = ReceiveLinks(OwnPools(layout, [pool.tensor], copy_pieces), "bench-copy", None, LinkConfig(), LinkTotals(4))
    stack.push_async_callback(links.close, 10.0)
    end = (await links.get(source)).end
    assert isinstance(end, SharedMemoryLink), "both processes are on this host"
    ways: list[_Handover | _SharedMemoryCopy] = [_SharedMemoryCopy(layout, end)]
    for transport, name in _HANDOVERS.items():
        receiver = KvReceiver(
            layout, [pool.tensor], f"bench-{transport.value}", transport=transport, copy_pieces=copy_pieces
        )
        stack.push_async_callback(receiver.close)
        ways.append(_Handover(name, layout, source, receiver))
    return ways
