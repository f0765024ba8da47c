"""Memory in huge pages, if Linux provides them.

Every step reads all weights. With pages of 4 KiB, page table walks (through two sets of tables in a virtual machine)
can take longer than reading the bytes.
"""

import contextlib
import mmap

import torch
from torch import Tensor

_HUGE_PAGE_BYTES = 2 << 20
_CHUNK_BYTES = 64 << 20


class HugePageArena:
    """Allocates tensors from large chunks. A chunk is freed when all its tensors are."""

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)

    def empty(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised, [num_elements], aligned to 64 bytes."""
        nbytes = num_elements * dtype.itemsize
        taken = -(-nbytes // 64) * 64
        if taken > self._rest.numel():
            self._rest = _allocate(max(taken, _CHUNK_BYTES))
        tensor, self._rest = self._rest[:nbytes], self._rest[taken:]
        return tensor.view(dtype)


def _allocate(nbytes: int) -> Tensor:
    """uint8 zeros [nbytes], aligned to a huge page."""
    memory = mmap.mmap(-1, nbytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages refuses this; small pages work too
        memory.madvise(mmap.MADV_HUGEPAGE)
    memory_bytes = torch.frombuffer(memory, dtype=torch.uint8)
    start = -memory_bytes.data_ptr() % _HUGE_PAGE_BYTES
    return memory_bytes[start : start + nbytes]
