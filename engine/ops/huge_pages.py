"""Memory in huge pages, where Linux gives them.

Weights and KV are read end to end in every step. In pages of 4 KiB each page costs a walk through the page tables, in a
virtual machine through two sets of them; that can cost more than the bytes.
"""

import contextlib
import mmap

import torch
from torch import Tensor

_HUGE_PAGE_BYTES = 2 << 20
_CHUNK_BYTES = 64 << 20


class HugePageArena:
    """Hands out memory for tensors that live as long as the arena's user, packed closely in large chunks."""

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)

    def empty(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised row, aligned to 64 bytes. It keeps its chunk alive."""
        nbytes = num_elements * dtype.itemsize
        taken = -(-nbytes // 64) * 64
        if taken > self._rest.numel():
            self._rest = huge_page_zeros(max(taken, _CHUNK_BYTES))
        row, self._rest = self._rest[:nbytes], self._rest[taken:]
        return row.view(dtype)


def huge_page_zeros(nbytes: int) -> Tensor:
    """A uint8 row of zeros, aligned to a huge page. Its pages come as they are first written."""
    memory = mmap.mmap(-1, nbytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # only a wish: a kernel without huge pages refuses it
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE_PAGE_BYTES
    return whole[start : start + nbytes]
