"""A copy of many pieces of memory in one call, for KV that moves between pools."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tandem.engine.ops.native_library import load_native_library

Offsets = NDArray[np.int64]


def native_copy_pieces() -> Callable[[int, Offsets, int, Offsets, int], None]:
    """`copy(target, target_offsets, source, source_offsets, piece_bytes)` in this thread, without the interpreter lock.

    Addresses are of the first byte of each side; offsets are contiguous. Faster than one copy of as many contiguous
    bytes by torch, since stores go past the caches. Raises NativeUnavailableError.
    """
    function = load_native_library().tandem_copy_pieces

    def copy(target: int, target_offsets: Offsets, source: int, source_offsets: Offsets, piece_bytes: int) -> None:
        assert len(target_offsets) == len(source_offsets), "as many pieces come as go"
        function(
            target,
            target_offsets.ctypes.data,
            source,
            source_offsets.ctypes.data,
            len(target_offsets),
            piece_bytes,
        )

    return copy
