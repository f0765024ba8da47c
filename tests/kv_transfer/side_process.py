"""One side of KV transfers in a process of its own, to be killed or stopped: `prefill`, or `decode ADDRESS TRANSPORT`.

Every attempt of the prefill side is finished at once: request "a-b" has blocks a..b-1. The decode side fetches the
whole pool again and again.
"""

import asyncio
import sys
import time
from itertools import count

import torch

from tandem.core.kv_layout import KvLayout
from tandem.kv_transfer.process_groups import GlooGroup, PendingOperation
from tandem.kv_transfer.receiver import KvReceiver
from tandem.wire.channels import open_channel
from tandem.wire.transfer import KvTransferClient
from tests.kv_transfer.holder import FakeHolder, serve_prefill, tokens

BIG = KvLayout(8, 512, 4, 16, 64, "bfloat16", "w")  # 64 MiB
SEND = GlooGroup.send


class ReadyHolder(FakeHolder):
    async def manifest(self, request_id: str, epoch: int, deadline_s: float):  # type: ignore[no-untyped-def]
        begin, end = map(int, request_id.split("-"))
        if not self._slot(request_id, epoch).done():
            self.finish(request_id, epoch, list(range(begin, end)))
        return await super().manifest(request_id, epoch, deadline_s)


def slow_send(group: GlooGroup, data: torch.Tensor) -> PendingOperation:
    """So that a test can act before the last chunk."""
    time.sleep(0.02)
    return SEND(group, data)


async def prefill(instance_id: str) -> None:
    GlooGroup.send = slow_send  # type: ignore[method-assign]
    async with serve_prefill(BIG, instance_id=instance_id, holder=ReadyHolder(BIG)) as served:
        print(served.address, flush=True)
        await asyncio.to_thread(sys.stdin.read)


async def decode(address: str, transport: str) -> None:
    pool = torch.zeros(BIG.pool_bytes, dtype=torch.uint8)
    receiver = KvReceiver(BIG, [pool], "decode-0", transport=transport)
    peer = KvTransferClient(open_channel(address), "prefill-0")
    everything = range(BIG.num_blocks)
    for epoch in count():
        await receiver.fetch(
            peer, f"0-{BIG.num_blocks}", epoch, tokens(BIG.num_blocks, BIG), everything, time.monotonic() + 30.0
        )
        print(epoch, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    asyncio.run(prefill(sys.argv[2]) if sys.argv[1] == "prefill" else decode(*sys.argv[2:]))
