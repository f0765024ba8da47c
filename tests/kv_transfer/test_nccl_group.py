"""Two GPUs of one process as the two ranks of a group. Not run where the project is developed: see `nccl_group`."""

import threading

import pytest
import torch

from tandem.core.errors import TransferError
from tandem.core.kv_layout import KvLayout
from tandem.kv_transfer.arrival import OwnPools, PairPlan
from tandem.kv_transfer.blocks import LeavingBlocks, PoolView
from tandem.kv_transfer.fence import WriteFence
from tandem.kv_transfer.nccl_group import NcclGroup
from tandem.kv_transfer.process_groups import DECODE_RANK, PREFILL_RANK, receive_chunks, send_chunks
from tandem.kv_transfer.rendezvous import LocalRendezvousStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU for each rank"),
]

LAYOUT = KvLayout(8, 64, 4, 16, 64, "bfloat16", "w")


@pytest.fixture
def ranks() -> list[NcclGroup]:
    store, found = LocalRendezvousStore(30.0), {}

    def connect(rank: int) -> None:
        found[rank] = NcclGroup.connect(rank, store, torch.device("cuda", rank), 30.0)

    threads = [threading.Thread(target=connect, args=(rank,)) for rank in (PREFILL_RANK, DECODE_RANK)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[PREFILL_RANK], found[DECODE_RANK]]


def test_blocks_arrive_equal(ranks: list[NcclGroup]) -> None:
    source = torch.randint(0, 256, (LAYOUT.pool_bytes,), dtype=torch.uint8, device="cuda:0")
    target = torch.zeros(LAYOUT.pool_bytes, dtype=torch.uint8, device="cuda:1")
    from_view, to_view = (PoolView.over(pool, LAYOUT) for pool in (source, target))
    theirs, ours = [3, 9, 1, 60], [0, 63, 5, 6]
    leaving = LeavingBlocks(PoolView.over(source, LAYOUT), LAYOUT, theirs, 4 * LAYOUT.block_size, 100_000)
    (arriving,) = PairPlan.make(LAYOUT, OwnPools(LAYOUT, [target])).arriving(ours, 4 * LAYOUT.block_size, 100_000)
    sent: list[int] = []

    def buffers(rank: NcclGroup) -> tuple[list[torch.Tensor], torch.Tensor]:
        first, second, scratch = (torch.empty(100_000, dtype=torch.uint8, device=rank.device) for _ in range(3))
        return [first, second], scratch

    def send() -> None:
        sent.append(send_chunks(ranks[0], leaving, *buffers(ranks[0]), timeout_s=30.0, checksum=True))

    sender = threading.Thread(target=send)
    sender.start()
    received = receive_chunks(ranks[1], arriving, *buffers(ranks[1]), WriteFence(), timeout_s=30.0, checksum=True)
    sender.join()
    assert sent == [received]
    assert torch.equal(to_view.words[:, :, ours].cpu(), from_view.words[:, :, theirs].cpu())


def test_a_receive_that_nobody_answers_ends_in_time(ranks: list[NcclGroup]) -> None:
    pending = ranks[1].receive(torch.zeros(1024, dtype=torch.uint8, device="cuda:1"))
    with pytest.raises(TransferError):
        pending.wait(0.5)
    for end in ranks:
        end.abort()
