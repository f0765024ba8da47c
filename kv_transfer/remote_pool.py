"""The KV pool of a rank on another host or GPU, which this process reads and writes over a connection."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.core.kv_layout import KvLayout
from tandem.kv_transfer.blocks import PoolView, word_of
from tandem.kv_transfer.places import Places
from tandem.kv_transfer.reshard import KvSlice


class RemotePool(ABC):
    """In the place of a `SharedPool`. Its methods may be called from several threads, and return when the bytes have
    moved. Raises TransferError."""

    fd = None

    @abstractmethod
    def read(self, layers: range, block_ids: Sequence[int], out: Tensor) -> None:
        """Fill `out` (contiguous uint8, on any device) with these layers of these blocks, [layer, kv, block, head,
        slot, head_dim]."""

    @abstractmethod
    def write(self, kv_slice: KvSlice, units: int, at: Places, values: Tensor) -> None:
        """As `put` into `PoolView.over(pool, layout, kv_slice, units).words`."""

    @abstractmethod
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class RemoteView:
    """The counterpart of `PoolView` for a pool that is not in this process's memory."""

    pool: RemotePool
    kv_slice: KvSlice
    units: int
    word: torch.dtype

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def take_blocks(self, layers: range, block_ids: Sequence[int], out: Tensor) -> None:
        self.pool.read(layers, block_ids, out)

    def put(self, layers: slice, at: Places, values: Tensor) -> None:
        first = self.kv_slice.layer_begin
        kv_slice = KvSlice(first + layers.start, first + layers.stop, self.kv_slice.head_begin, self.kv_slice.head_end)
        self.pool.write(kv_slice, self.units, at, values)


def view_over(
    pool: Tensor | RemotePool, layout: KvLayout, kv_slice: KvSlice | None = None, units: int = 1
) -> PoolView | RemoteView:
    """A view over any pool; see `PoolView.over`."""
    if isinstance(pool, Tensor):
        return PoolView.over(pool, layout, kv_slice, units)
    whole = KvSlice(0, layout.num_layers, 0, layout.num_kv_heads)
    return RemoteView(pool, kv_slice or whole, units, word_of(layout, units))
