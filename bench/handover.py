"""Time of a KV hand-over between two processes, per transport, beside a plain copy of the same bytes in the same run.

The source is a prefill worker without an engine, in a process of its own: `python -m bench.handover` prints a table.
A hand-over is everything a decode worker waits for once the prefill is finished: pull, check, copy, acknowledge.
"""

import argparse
import asyncio
import random
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import median

import torch

from tandem.core.clock import SystemClock
from tandem.core.kv_layout import KvLayout
from tandem.core.request import SampledToken
from tandem.core.transfer import Manifest, Transport, hash_token_ids
from tandem.kv_transfer.pool import SharedPool
from tandem.kv_transfer.receiver import KvReceiver
from tandem.kv_transfer.sender import KvSender
from tandem.v1 import transfer_pb2_grpc
from tandem.wire.channels import open_channel
from tandem.wire.server import bind, build_server
from tandem.wire.transfer import KvTransferClient, KvTransferServicer

SOURCE_ID = "bench-source"
CPU_TRANSPORTS = (Transport.SHARED_MEMORY, Transport.GLOO)


@dataclass(frozen=True, slots=True)
class HandoverTime:
    """Medians over the repetitions. `plain_s` is one thread's copy of as many contiguous bytes, warm."""

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


class _StandingHolder:
    """Every attempt is finished at once. Its request id says which blocks it has: "<seed>-<number of blocks>"."""

    def __init__(self, layout: KvLayout) -> None:
        self._layout = layout

    async def manifest(self, request_id: str, epoch: int, deadline_s: float) -> Manifest:
        seed, num_blocks = map(int, request_id.split("-"))
        token_ids = token_ids_of(num_blocks, self._layout)
        return Manifest(
            request_id=request_id,
            epoch=epoch,
            num_tokens=len(token_ids),
            token_hash=hash_token_ids(token_ids),
            block_ids=tuple(block_ids_of(seed, num_blocks, self._layout)),
            fingerprint=self._layout.fingerprint,
            bytes_per_layer=num_blocks * 2 * self._layout.segment_bytes,
            first_token=SampledToken(0),
        )

    async def acknowledge(self, request_id: str, epoch: int) -> bool:
        return True


def token_ids_of(num_blocks: int, layout: KvLayout) -> tuple[int, ...]:
    return tuple(range(num_blocks * layout.block_size))


def block_ids_of(seed: int, num_blocks: int, layout: KvLayout) -> list[int]:
    """Seed 0: one run of blocks. Others: blocks from all over the pool, as after long use."""
    if seed == 0:
        return list(range(num_blocks))
    return random.Random(seed).sample(range(layout.num_blocks), num_blocks)


async def measure(
    layout: KvLayout,
    num_blocks: int,
    *,
    transports: Sequence[Transport] = CPU_TRANSPORTS,
    scattered: bool = False,
    repetitions: int = 9,
) -> list[HandoverTime]:
    """Hand over `num_blocks` blocks of a pool like `layout` on each transport. Copies and transports take turns."""
    torch.set_num_threads(1)
    pool = SharedPool.create(layout.pool_bytes)
    num_bytes = num_blocks * layout.block_bytes
    plain_from, plain_to = (torch.ones(num_bytes, dtype=torch.uint8) for _ in range(2))
    plain_s: list[float] = []
    handover_s: dict[Transport, list[float]] = {transport: [] for transport in transports}
    receivers = {
        transport: KvReceiver(layout, pool.tensor, f"bench-{transport.value}", transport=transport)
        for transport in transports
    }
    try:
        async with _source(layout) as peer:
            for i in range(repetitions + 1):
                started_s = time.perf_counter()
                plain_to.copy_(plain_from)
                plain_s.append(time.perf_counter() - started_s)
                seeds = (2 * i + 1, 2 * i + 2) if scattered else (0, 0)
                for transport, receiver in receivers.items():
                    deadline_s = time.monotonic() + 60.0
                    started_s = time.perf_counter()
                    await receiver.fetch(
                        peer,
                        f"{seeds[0]}-{num_blocks}",
                        0,
                        token_ids_of(num_blocks, layout),
                        block_ids_of(seeds[1], num_blocks, layout),
                        deadline_s,
                    )
                    handover_s[transport].append(time.perf_counter() - started_s)
    finally:
        for receiver in receivers.values():
            await receiver.close()
        pool.close()
    plain = median(plain_s[1:])  # the first of each warms up: pages, links
    return [HandoverTime(transport, num_bytes, median(times[1:]), plain) for transport, times in handover_s.items()]


@asynccontextmanager
async def _source(layout: KvLayout) -> AsyncIterator[KvTransferClient]:
    """A source in another process, which ends when its standard input does."""
    fields = (layout.num_layers, layout.num_blocks, layout.num_kv_heads, layout.block_size, layout.head_dim)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "bench.handover", "source", *map(str, fields), layout.dtype),
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


async def _serve_source(layout: KvLayout) -> None:
    torch.set_num_threads(1)
    pool = SharedPool.create(layout.pool_bytes)
    sender = KvSender(layout, pool, SOURCE_ID)
    server, _ = build_server()
    servicer = KvTransferServicer(sender, _StandingHolder(layout), SystemClock())
    transfer_pb2_grpc.add_KvTransferServiceServicer_to_server(servicer, server)
    address = bind(server, "127.0.0.1:0")
    await server.start()
    print(address, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)
    await sender.close()
    pool.close()


def _layout_of(fields: Sequence[str]) -> KvLayout:
    layers, blocks, heads, block_size, head_dim = map(int, fields[:5])
    return KvLayout(layers, blocks, heads, block_size, head_dim, fields[5], "bench")


async def _print_table() -> None:
    print(f"{'block':>9} {'bytes':>10} {'blocks':>9} {'transport':>14} {'ms':>8} {'GB/s':>6} {'of plain copy':>14}")
    for layers, heads, head_dim in ((8, 4, 64), (28, 2, 128), (32, 8, 128)):
        block_bytes = KvLayout(layers, 1, heads, 16, head_dim, "bfloat16", "bench").block_bytes
        layout = KvLayout(layers, (256 << 20) // block_bytes, heads, 16, head_dim, "bfloat16", "bench")
        for megabytes in (4, 64):
            for scattered in (False, True):
                for result in await measure(layout, (megabytes << 20) // block_bytes, scattered=scattered):
                    print(
                        f"{block_bytes >> 10:>5} KiB {result.num_bytes / 1e6:>7.1f} MB"
                        f" {'scattered' if scattered else 'one run':>9} {result.transport.value:>14}"
                        f" {result.handover_s * 1e3:>8.2f} {result.gigabytes_per_s:>6.2f}"
                        f" {result.share_of_plain:>13.0%}"
                    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="*", help="internal: `source` and the layout's numbers")
    arguments = parser.parse_args().source
    if arguments:
        asyncio.run(_serve_source(_layout_of(arguments[1:])))
    else:
        asyncio.run(_print_table())


if __name__ == "__main__":
    main()
