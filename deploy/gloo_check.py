"""A gloo pair with both ends in this process, to see whether it works here at all."""

from concurrent.futures import ThreadPoolExecutor

import torch

from tandem.core.errors import TransferError
from tandem.kv_transfer.process_groups import GlooDevice, GlooGroup
from tandem.kv_transfer.rendezvous import LocalRendezvousStore

_NUM_BYTES = 1 << 16


def send_once(timeout_s: float) -> None:
    """Send some bytes from one end to the other. Raises TransferError if they do not arrive unchanged."""
    device, store = GlooDevice("127.0.0.1"), LocalRendezvousStore(timeout_s)
    sent = torch.arange(_NUM_BYTES, dtype=torch.int64).to(torch.uint8)
    received = torch.zeros_like(sent)
    with ThreadPoolExecutor(2) as ends:
        other = ends.submit(GlooGroup.connect, 1, store, device, timeout_s)
        ranks = GlooGroup.connect(0, store, device, timeout_s), other.result()
        arriving = ranks[1].receive(received)
        leaving = ranks[0].send(sent)
        leaving.wait(timeout_s)
        arriving.wait(timeout_s)
    if not torch.equal(sent, received):
        raise TransferError("bytes sent over gloo arrived changed")
