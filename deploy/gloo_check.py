"""A test of gloo on this machine, with two ranks in this process."""

from concurrent.futures import ThreadPoolExecutor

import torch

from tandem.core.errors import TransferError
from tandem.kv_transfer.process_groups import GlooDevice, GlooGroup
from tandem.kv_transfer.rendezvous import LocalRendezvousStore

_NUM_BYTES = 1 << 16


def exchange_bytes(timeout_s: float) -> None:
    """Send some bytes from one rank to the other. Raises TransferError if they do not arrive unchanged."""
    device, store = GlooDevice("127.0.0.1"), LocalRendezvousStore(timeout_s)
    sent = torch.arange(_NUM_BYTES, dtype=torch.int64).to(torch.uint8)
    received = torch.zeros_like(sent)
    with ThreadPoolExecutor(2) as threads:
        second = threads.submit(GlooGroup.connect, 1, store, device, timeout_s)
        ranks = GlooGroup.connect(0, store, device, timeout_s), second.result()
        receiving = ranks[1].receive(received)
        sending = ranks[0].send(sent)
        sending.wait(timeout_s)
        receiving.wait(timeout_s)
    if not torch.equal(sent, received):
        raise TransferError("bytes sent over gloo arrived changed")
