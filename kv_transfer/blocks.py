"""Views over a pool's blocks, and copies between them. All but `WriteFence.close` run in the calling thread."""

import asyncio
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from tandem.core.errors import TransferError
from tandem.core.kv_layout import DTYPE_BYTES, KvLayout
from tandem.core.transfer import KvSlice
from tandem.kv_transfer.owner_thread import OwnerThread

# torch spreads a copy over several threads from this many elements on. Views stay below it: decode's steps need the
# other cores, and the threads would have to be started and to wait for each other.
_MAX_VIEW_WORDS = 32767
_FENCED_BYTES = 4 << 20  # copied between two checks of the fence


BlockViews = tuple[tuple[torch.Tensor, ...], ...]  # [block][view]


class WriteFence:
    """Forbids late writes into blocks: once `close` has returned, nothing more is written under this fence."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held by the thread that writes
        self._closed = False

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around each write, in the writing thread. Raises TransferError once the fence is closed."""
        with self._lock:
            if self._closed:
                raise TransferError("the transfer was given up")
            yield

    async def close(self) -> None:
        """Return when the write under way, if any, is done; a cancellation takes effect only then.

        The wait has a thread of its own: on a GPU the write may be queued behind other work of the device.
        """
        self._closed = True
        if self._lock.acquire(blocking=False):
            self._lock.release()
            return
        waiter = OwnerThread.start("kv-fence")
        written = asyncio.wrap_future(waiter.submit(self._wait))
        waiter.stop()
        cancelled: asyncio.CancelledError | None = None
        while not written.done():
            try:
                await asyncio.shield(written)
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled

    def _wait(self) -> None:
        with self._lock:
            pass


class TransferChunk(NamedTuple):
    """A rectangle of a transfer, sent as one message: layers of the KV slice, positions in the block list."""

    layers: range
    blocks: range


@dataclass(frozen=True, slots=True)
class PoolView:
    """A KV slice of one rank's pool: `words` is [layer, kv, block, head, word], over all blocks."""

    words: torch.Tensor

    @classmethod
    def over(cls, pool: torch.Tensor, layout: KvLayout, kv_slice: KvSlice) -> "PoolView":
        """`pool` is contiguous, of any dtype, and at least `layout.pool_bytes` long."""
        head_bytes = layout.block_size * layout.head_dim * DTYPE_BYTES[layout.dtype]
        word = torch.int64 if head_bytes % 8 == 0 else torch.int16
        row = pool.view(-1).view(torch.uint8)[: layout.pool_bytes].view(word)
        words = row.view(layout.num_layers, 2, layout.num_blocks, layout.num_kv_heads, head_bytes // word.itemsize)
        layers = slice(kv_slice.layer_begin, kv_slice.layer_end)
        return cls(words[layers, :, :, kv_slice.head_begin : kv_slice.head_end])

    def block_views(self) -> BlockViews:
        """Of every block, views that together cover the block, each small enough to be copied in one thread.

        To be made once: making a view in Python takes as long as copying 20 KB.
        """
        num_layers = self.words.shape[0]
        step = max(1, _MAX_VIEW_WORDS // self.words[0, :, 0].numel())
        groups = [self.words[layer : layer + step].unbind(2) for layer in range(0, num_layers, step)]
        return tuple(zip(*groups, strict=True))

    @property
    def layer_block_bytes(self) -> int:
        """Bytes of one block in one layer, K and V."""
        _, kv, _, heads, words = self.words.shape
        return kv * heads * words * self.words.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over the slice's layers, K and V."""
        return self.words.shape[0] * self.layer_block_bytes


class BlockTransfer:
    """One side of a transfer: blocks of a view, in order, and the chunks in which their bytes travel.

    A chunk has at most `max_chunk_bytes`, but never less than one block of one layer. Both sides of a transfer compute
    the same chunks.
    """

    def __init__(self, view: PoolView, block_ids: Sequence[int], max_chunk_bytes: int) -> None:
        self._view = view
        self.block_ids = block_ids
        self.chunks = split_transfer(view.words.shape[0], len(block_ids), view.layer_block_bytes, max_chunk_bytes)
        self.staging_bytes = max(map(self.chunk_bytes, self.chunks), default=0)  # of the largest chunk

    def chunk_bytes(self, chunk: TransferChunk) -> int:
        return len(chunk.layers) * len(chunk.blocks) * self._view.layer_block_bytes

    def gather(self, chunk: TransferChunk, staging: torch.Tensor) -> torch.Tensor:
        """Copy a chunk into the front of `staging` (uint8) and return that part of it."""
        part = staging[: self.chunk_bytes(chunk)]
        torch.index_select(self._layers(chunk), 2, self._index(chunk), out=self._shaped(chunk, part))
        return part

    def scatter(self, chunk: TransferChunk, part: torch.Tensor) -> None:
        """Copy a chunk's bytes into its blocks."""
        self._layers(chunk).index_copy_(2, self._index(chunk), self._shaped(chunk, part))

    def checksum(self) -> int:
        """CRC-32 of the blocks' bytes in the order in which the chunks are sent."""
        staging = torch.empty(self.staging_bytes, dtype=torch.uint8, device=self._view.words.device)
        value = 0
        for chunk in self.chunks:
            value = crc32(self.gather(chunk, staging), value)
        return value

    @cached_property
    def _block_index(self) -> torch.Tensor:
        return torch.tensor(self.block_ids, device=self._view.words.device)

    def _index(self, chunk: TransferChunk) -> torch.Tensor:
        return self._block_index[chunk.blocks.start : chunk.blocks.stop]

    def _layers(self, chunk: TransferChunk) -> torch.Tensor:
        return self._view.words[chunk.layers.start : chunk.layers.stop]

    def _shaped(self, chunk: TransferChunk, part: torch.Tensor) -> torch.Tensor:
        _, kv, _, *head = self._view.words.shape
        return part.view(self._view.words.dtype).view(len(chunk.layers), kv, len(chunk.blocks), *head)


def split_transfer(num_layers: int, num_blocks: int, layer_block_bytes: int, max_bytes: int) -> list[TransferChunk]:
    """The chunks of a `BlockTransfer`, layer by layer. `layer_block_bytes` are those of one block in one layer."""
    assert max_bytes > 0
    if num_layers == 0 or num_blocks == 0:
        return []
    layers = max(1, min(num_layers, max_bytes // (layer_block_bytes * num_blocks)))
    blocks = max(1, min(num_blocks, max_bytes // layer_block_bytes))
    return [
        TransferChunk(range(num_layers)[layer : layer + layers], range(num_blocks)[block : block + blocks])
        for layer in range(0, num_layers, layers)
        for block in range(0, num_blocks, blocks)
    ]


def crc32(data: torch.Tensor, value: int = 0) -> int:
    """CRC-32 (zlib's) of a contiguous uint8 tensor, continuing from `value`."""
    return zlib.crc32(data.cpu().numpy().data, value)


def copy_blocks(
    source: BlockViews, source_ids: Sequence[int], destination: BlockViews, block_ids: Sequence[int], fence: WriteFence
) -> None:
    """Copy blocks from pool to pool, without a copy in between. Raises TransferError once the fence is closed.

    One call of `_foreach_copy_` copies many views without the interpreter lock: taking it back between the views
    would let the engine's thread delay each of them.
    """
    step = max(1, _FENCED_BYTES // sum(view.nbytes for view in source[0]))
    for begin in range(0, len(source_ids), step):
        sources = [view for block in source_ids[begin : begin + step] for view in source[block]]
        targets = [view for block in block_ids[begin : begin + step] for view in destination[block]]
        with fence.writing():
            torch._foreach_copy_(targets, sources)
