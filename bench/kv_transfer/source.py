"""The source of measured hand-overs: a prefill worker without an engine. `bench.kv_transfer.measure` starts it.

Argument: the fields of its layout as JSON. It prints its address, and ends when its standard input does.
"""

import asyncio
import json
import random
import sys

import torch

from tandem.core.clock import SystemClock
from tandem.core.kv_frontier import KvFrontier
from tandem.core.kv_layout import KvLayout
from tandem.core.request import SampledToken
from tandem.core.transfer import Manifest, hash_token_ids
from tandem.engine.ops.kv_codec import NativeKvCodes
from tandem.kv_transfer.pool import SharedPool
from tandem.kv_transfer.sender import KvSender
from tandem.v1 import transfer_pb2_grpc
from tandem.wire.server import bind, build_server
from tandem.wire.transfer import KvTransferServicer

SOURCE_ID = "bench-source"


class _ComputedPrompts:
    """Every prompt is already computed. A request id names its blocks and tokens: "<seed>-<number of tokens>"."""

    def __init__(self, layout: KvLayout) -> None:
        self._layout = layout

    async def manifest(self, request_id: str, epoch: int, deadline_s: float) -> Manifest:
        return self._manifest(request_id, epoch)

    def _manifest(self, request_id: str, epoch: int) -> Manifest:
        seed, num_tokens = map(int, request_id.split("-"))
        token_ids = tuple(range(num_tokens))
        num_blocks = self._layout.blocks_for(num_tokens)
        return Manifest(
            request_id=request_id,
            epoch=epoch,
            num_tokens=len(token_ids),
            token_hash=hash_token_ids(token_ids),
            block_ids=tuple(block_ids_of(seed, num_blocks, self._layout)),
            fingerprint=self._layout.fingerprint,
            block_size=self._layout.block_size,
            first_token=SampledToken(0),
        )

    async def computed(
        self, request_id: str, epoch: int, known: KvFrontier, min_new: int, has_all: bool, deadline_s: float
    ) -> Manifest:
        return await self.manifest(request_id, epoch, deadline_s)

    def readable(self, request_id: str, epoch: int) -> Manifest:
        return self._manifest(request_id, epoch)

    async def acknowledge(self, request_id: str, epoch: int) -> bool:
        return True


def block_ids_of(seed: int, num_blocks: int, layout: KvLayout) -> list[int]:
    """Seed 0: contiguous blocks. Other seeds: random blocks of the pool, as after long use."""
    if seed == 0:
        return list(range(num_blocks))
    return random.Random(seed).sample(range(layout.num_blocks), num_blocks)


async def _serve(layout: KvLayout) -> None:
    torch.set_num_threads(1)
    pools = [SharedPool.create(layout.pool_of(rank).pool_bytes) for rank in range(layout.num_ranks)]
    sender = KvSender(layout, pools, SOURCE_ID, codes=NativeKvCodes())
    server, _ = build_server()
    servicer = KvTransferServicer(sender, _ComputedPrompts(layout), SystemClock())
    transfer_pb2_grpc.add_KvTransferServiceServicer_to_server(servicer, server)
    address = bind(server, "127.0.0.1:0")
    await server.start()
    print(address, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)
    await sender.close()
    for pool in pools:
        pool.close()


def _layout_of(text: str) -> KvLayout:
    fields = json.loads(text)
    return KvLayout(**fields | {"layers_per_stage": tuple(fields["layers_per_stage"])})


if __name__ == "__main__":
    asyncio.run(_serve(_layout_of(sys.argv[1])))
