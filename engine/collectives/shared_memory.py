"""Collectives between the ranks of one host, in a memory file that all ranks map. C++ kernels do the waiting.

    [ abort word | a stamp and a report per rank | two slots per rank, for sums | mailboxes ]

A mailbox is one direction between two ranks: hidden states go from a rank of a stage to the same rank of the next one,
logits from the last stage to rank 0. The kernels are in engine/native/collectives.h; ctypes releases the interpreter's
lock while they wait.

With several steps under way, ranks that wait for free slots of a mailbox could deadlock: rank 0 sends hidden states
while the last stage sends logits. So a sender does not wait: if a tensor does not fit into the mailbox, a thread writes
it. A second such tensor waits for the first, which bounds how far a stage can be ahead.
"""

import ctypes
import math
import mmap
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from tandem.core.parallel import ParallelShape
from tandem.engine.collectives.interface import RankLostError

_LINE_BYTES = 64  # words that different ranks write are in different cache lines
_REPORT_OFFSET = 8  # in a rank's line, after its stamp
_MAX_LAYERS = 1 << 16  # of a stage
_SLOT_BYTES = 1 << 20
_DEPTH = 4  # slots of a mailbox
_MAILBOX_BYTES = 2 * _LINE_BYTES + _DEPTH * _SLOT_BYTES
_ABORTED, _TIMED_OUT = 1, 2
# A backstop only: lost ranks are found by `worker.ranks`, which sets the abort word.
_TIMEOUT_S = 300.0


class SharedRegion:
    """The memory file, mapped by this process. `fd` stays the caller's."""

    def __init__(self, fd: int, shape: ParallelShape) -> None:
        self._mapping = mmap.mmap(fd, _region_bytes(shape))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))

    @staticmethod
    def create(shape: ParallelShape) -> int:
        """A new zeroed memory file, closed on exec; it vanishes with the last process that has it."""
        fd = os.memfd_create("tandem-ranks", os.MFD_CLOEXEC)
        os.ftruncate(fd, _region_bytes(shape))
        return fd

    def report(self, rank: int, step: int, layers: int) -> None:
        """Rank `rank` has computed `layers` of its layers in a step. Other ranks read this with `reported`."""
        self._report_of(rank).value = step * _MAX_LAYERS + layers

    def reported(self, rank: int) -> tuple[int, int]:
        """The last (step, layers) of that rank; (0, 0) at first. Its earlier writes are visible to this process."""
        return divmod(self._report_of(rank).value, _MAX_LAYERS)

    def _report_of(self, rank: int) -> ctypes.c_int64:
        return ctypes.c_int64.from_address(self.address + _LINE_BYTES * (1 + rank) + _REPORT_OFFSET)

    def abort(self) -> None:
        """End all waits of all ranks. From any thread."""
        ctypes.c_int64.from_address(self.address).value = 1


class SharedMemoryCollectives:
    """Implements `Collectives` for tensors in the host's memory."""

    def __init__(self, shape: ParallelShape, rank: int, region: SharedRegion, library: ctypes.CDLL) -> None:
        self._shape = shape
        self._rank = rank
        self._region = region  # keeps the memory mapped
        self._library = library
        self._num_sums = 0
        first = rank - rank % shape.tp  # of the stage
        self._stamps = region.address + _LINE_BYTES * (1 + first)
        self._slots = region.address + _slots_offset(shape) + 2 * _SLOT_BYTES * first
        begin = region.address + _slots_offset(shape) + 2 * _SLOT_BYTES * shape.num_ranks
        self._mailboxes = {pair: begin + number * _MAILBOX_BYTES for number, pair in enumerate(_pairs(shape))}
        self._wait = (region.address, int(_TIMEOUT_S * 1e9))
        self._writer: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None

    def all_reduce(self, x: Tensor) -> Tensor:
        tp = self._shape.tp
        if tp == 1:
            return x
        y = x.to(torch.float32).contiguous()  # `x` itself where the activations are in float32
        slot_floats = _SLOT_BYTES // 4
        outcome = self._library.tandem_all_reduce(
            *self._wait,
            self._stamps,
            self._slots,
            slot_floats,
            tp,
            self._rank % tp,
            self._num_sums,
            y.data_ptr(),
            y.numel(),
        )
        self._check(outcome)
        self._num_sums += max(1, -(-y.numel() // slot_floats))
        return y.to(x.dtype)

    def send(self, to_rank: int, x: Tensor) -> None:
        x = x.contiguous()
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()
        mailbox = self._mailboxes[self._rank, to_rank]
        num_pieces = -(-x.numel() * x.itemsize // _SLOT_BYTES)
        if num_pieces <= _DEPTH - _num_unread(mailbox):
            self._write(mailbox, x)
        else:
            self._writer = self._writer or ThreadPoolExecutor(1, "rank-sends")
            self._writing = self._writer.submit(self._write, mailbox, x.clone())

    def receive(self, from_rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        x = torch.empty(*shape, dtype=dtype)
        mailbox = self._mailboxes[from_rank, self._rank]
        num_bytes = math.prod(shape) * dtype.itemsize
        self._check(self._library.tandem_receive(*self._wait, mailbox, _DEPTH, _SLOT_BYTES, x.data_ptr(), num_bytes))
        return x

    def close(self) -> None:
        """The memory is unmapped with the last object that uses it."""
        if self._writer is not None:
            self._writer.shutdown(wait=False)

    def _write(self, mailbox: int, x: Tensor) -> None:
        outcome = self._library.tandem_send(
            *self._wait, mailbox, _DEPTH, _SLOT_BYTES, x.data_ptr(), x.numel() * x.itemsize
        )
        self._check(outcome)

    @staticmethod
    def _check(outcome: int) -> None:
        if outcome == _ABORTED:
            raise RankLostError("another rank of the instance is gone")
        if outcome == _TIMED_OUT:
            raise RankLostError(f"another rank of the instance has not answered in {_TIMEOUT_S:.0f} s")


def _num_unread(mailbox: int) -> int:
    """Slots of the mailbox that are in use. Only the receiver frees slots."""
    written, read = (ctypes.c_int64.from_address(mailbox + _LINE_BYTES * word).value for word in range(2))
    return written - read


def _pairs(shape: ParallelShape) -> list[tuple[int, int]]:
    """Pairs (sender, receiver) of ranks."""
    last_stage = shape.num_ranks - shape.tp
    hidden = [(rank, rank + shape.tp) for rank in range(last_stage)]
    return hidden + [(rank, 0) for rank in range(max(1, last_stage), shape.num_ranks)]


def _slots_offset(shape: ParallelShape) -> int:
    return -(-_LINE_BYTES * (1 + shape.num_ranks) // mmap.PAGESIZE) * mmap.PAGESIZE


def _region_bytes(shape: ParallelShape) -> int:
    return _slots_offset(shape) + 2 * _SLOT_BYTES * shape.num_ranks + len(_pairs(shape)) * _MAILBOX_BYTES
