"""A process group of two GPUs over NCCL. NOT RUN YET, for want of two GPUs; see the tests marked `gpu`.

Non-blocking communicator with few thread blocks, so that it can be aborted and leaves the SMs to the engine; waits
poll, so that they can time out. NCCL has no tags: sends and receives match by order, one transfer at a time. A process
that uses this sets TORCH_NCCL_ASYNC_ERROR_HANDLING=0 before importing torch, or torch ends it on the first error.
"""

import time
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from tandem.core.errors import TransferError
from tandem.kv_transfer.process_groups import TwoRankGroup
from tandem.kv_transfer.rendezvous import RendezvousStore

_POLL_S = 0.0002
_MAX_CTAS = 4


class NcclGroup(TwoRankGroup):
    """Between GPUs, on a stream of its own."""

    def __init__(self, group: Any, rank: int, device: torch.device) -> None:
        super().__init__(group, rank, device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @classmethod
    def connect(cls, rank: int, store: RendezvousStore, device: torch.device, timeout_s: float) -> "NcclGroup":
        """Blocks until the other rank does the same. Raises TransferError."""
        options = distributed.ProcessGroupNCCL.Options()
        options.config.blocking = 0
        options.config.min_ctas = 1
        options.config.max_ctas = _MAX_CTAS
        options._timeout = timedelta(seconds=timeout_s)
        options.global_ranks_in_group = [0, 1]
        try:
            group = distributed.ProcessGroupNCCL(store, rank, 2, options)
            group._set_sequence_number_for_group()
            group.eager_connect_single_device(device)
        except RuntimeError as error:
            raise TransferError("the two ranks of the KV link did not connect") from error
        return cls(group, rank, device)

    def stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def synchronize(self) -> None:
        self._stream.synchronize()

    def abort(self) -> None:
        self._group.abort()

    @staticmethod
    def _wait(work: distributed.Work, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not work.is_completed():
            if time.monotonic() > deadline_s:
                raise TransferError("the KV link stalled")
            time.sleep(_POLL_S)
        work.wait()  # orders the current stream after the operation; the host does not wait
