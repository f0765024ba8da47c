"""The memory of a rank's KV pool; on a CPU another process of the same host can map it."""

import contextlib
import ctypes
import fcntl
import mmap
import os

import numpy as np
import torch

from tandem.core.errors import TransferError

# <linux/fcntl.h>; Python 3.11 does not name it. New mappings are read-only, the one made before stays writable.
_F_SEAL_FUTURE_WRITE = 0x0010
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | _F_SEAL_FUTURE_WRITE


class SharedPool:
    """`tensor` is one uint8 row of `nbytes`. Another process can map `fd`, read-only; it is None for CUDA memory.

    A pool that `seal` was called for cannot shrink under a reader (which would kill the reader), and readers cannot
    write to it.
    """

    def __init__(self, tensor: torch.Tensor, fd: int | None) -> None:
        self.tensor = tensor
        self.fd = fd

    @classmethod
    def create(cls, nbytes: int, device: torch.device | str = "cpu") -> "SharedPool":
        """Zeroed, already backed by memory, and sealed."""
        if torch.device(device).type != "cpu":
            return cls(torch.zeros(nbytes, dtype=torch.uint8, device=device), None)
        pool = cls.open(create_pool_file(), nbytes)
        pool.tensor.zero_()  # the first touch of a page costs thirty times a copy; pay it before the first request
        pool.seal()
        return pool

    @classmethod
    def open(cls, fd: int, nbytes: int) -> "SharedPool":
        """The pool in a file that is not sealed yet, which is set to `nbytes`. The pool owns `fd`, also on failure."""
        try:
            os.ftruncate(fd, nbytes)
            mapping = mmap.mmap(fd, nbytes)
        except BaseException:
            os.close(fd)
            raise
        with contextlib.suppress(OSError):  # best effort: most kernels keep huge pages off for shared memory
            mapping.madvise(mmap.MADV_HUGEPAGE)
        return cls(torch.frombuffer(mapping, dtype=torch.uint8), fd)

    def seal(self) -> None:
        """No process can map it for writing from now on."""
        assert self.fd is not None
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)

    def close(self) -> None:
        """Release the pool. The memory is freed with the last tensor over it."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
        self.tensor = torch.empty(0, dtype=torch.uint8)


def create_pool_file() -> int:
    """An anonymous memory file, empty: it has no name and vanishes with the last process that uses it."""
    return os.memfd_create("tandem-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def map_read_only(fd: int, nbytes: int) -> torch.Tensor:
    """The first `nbytes` of another process's pool, as uint8. Writing to it would kill this process: never do.

    The mapping lives as long as the tensor; `fd` stays the caller's. Raises TransferError if `fd` is no sealed pool of
    at least that size.
    """
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    if os.fstat(fd).st_size < nbytes or not seals & fcntl.F_SEAL_SHRINK:
        raise TransferError("the prefill worker's pool is smaller than it announced")
    flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
    mapping = mmap.mmap(fd, nbytes, flags=flags, prot=mmap.PROT_READ)
    # torch warns about memory that it cannot write, so torch gets the bare address; `owner` keeps the mapping alive.
    owner = (ctypes.c_char * nbytes).from_address(np.frombuffer(mapping, dtype=np.uint8).ctypes.data)
    owner.mapping = mapping  # type: ignore[attr-defined]
    return torch.frombuffer(owner, dtype=torch.uint8)
