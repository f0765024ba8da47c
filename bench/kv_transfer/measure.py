"""Times KV hand-overs between two processes, on each transport, and a plain copy of the same bytes."""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from statistics import median

import torch

from bench.kv_transfer.source import SOURCE_ID, block_ids_of
from tandem.core.kv_layout import KvLayout
from tandem.core.transfer import Transport
from tandem.engine.ops.piece_copy import native_copy_pieces
from tandem.kv_transfer.pool import SharedPool
from tandem.kv_transfer.receiver import KvReceiver
from tandem.wire.channels import open_channel
from tandem.wire.transfer import KvTransferClient

CPU_TRANSPORTS = (Transport.SHARED_MEMORY, Transport.GLOO)


@dataclass(frozen=True, slots=True)
class HandoverTime:
    """Medians over the repetitions. `plain_s`: a warm copy of as many contiguous bytes by one thread."""

    transport: Transport
    num_bytes: int
    handover_s: float
    plain_s: float

    @property
    def gigabytes_per_s(self) -> float:
        return self.num_bytes / self.handover_s / 1e9

    @property
    def seconds_per_megabyte(self) -> float:
        return self.handover_s / (self.num_bytes / 1e6)

    @property
    def share_of_plain(self) -> float:
        """1.0: as fast as the plain copy."""
        return self.plain_s / self.handover_s


async def measure(
    layout: KvLayout,
    num_blocks: int,
    *,
    source_layout: KvLayout | None = None,
    transports: Sequence[Transport] = CPU_TRANSPORTS,
    scattered: bool = False,
    repetitions: int = 9,
) -> list[HandoverTime]:
    """Hand over `num_blocks` blocks to an instance with `layout` on each transport. Copies and transports take turns.
    `source_layout` None: the source has the same."""
    torch.set_num_threads(1)
    pools = [SharedPool.create(layout.pool_of(rank).pool_bytes) for rank in range(layout.num_ranks)]
    num_bytes = num_blocks * layout.block_bytes
    plain_from, plain_to = (torch.ones(num_bytes, dtype=torch.uint8) for _ in range(2))
    plain_s: list[float] = []
    handover_s: dict[Transport, list[float]] = {transport: [] for transport in transports}
    receivers = {
        transport: KvReceiver(
            layout,
            [pool.tensor for pool in pools],
            f"bench-{transport.value}",
            transport=transport,
            copy_pieces=native_copy_pieces(),
        )
        for transport in transports
    }
    try:
        async with served_source(source_layout or layout) as source:
            for i in range(repetitions + 1):
                started_s = time.perf_counter()
                plain_to.copy_(plain_from)
                plain_s.append(time.perf_counter() - started_s)
                seeds = (2 * i + 1, 2 * i + 2) if scattered else (0, 0)
                for transport, receiver in receivers.items():
                    handover_s[transport].append(await fetch_s(receiver, source, layout, num_blocks, seeds))
    finally:
        for receiver in receivers.values():
            await receiver.close()
        for pool in pools:
            pool.close()
    plain = median(plain_s[1:])  # the first of each is a warm-up of pages and links
    return [HandoverTime(transport, num_bytes, median(times[1:]), plain) for transport, times in handover_s.items()]


async def fetch_s(
    receiver: KvReceiver, source: KvTransferClient, layout: KvLayout, num_blocks: int, seeds: tuple[int, int]
) -> float:
    """Seconds of one hand-over into `num_blocks` blocks of an instance with `layout`. `seeds`: see `block_ids_of`."""
    num_tokens = num_blocks * layout.block_size
    block_ids = block_ids_of(seeds[1], num_blocks, layout)
    deadline_s = time.monotonic() + 60.0
    started_s = time.perf_counter()
    await receiver.fetch(source, f"{seeds[0]}-{num_tokens}", 0, range(num_tokens), block_ids, deadline_s)
    return time.perf_counter() - started_s


@asynccontextmanager
async def served_source(layout: KvLayout) -> AsyncIterator[KvTransferClient]:
    """A source in another process."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.kv_transfer.source", json.dumps(asdict(layout))),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    address = (await process.stdout.readline()).decode().strip()
    channel = open_channel(address)
    try:
        yield KvTransferClient(channel, SOURCE_ID)
    finally:
        await channel.close()
        process.stdin.close()
        await process.wait()
