"""Views over a pool's blocks, and copies of them. All of it runs in the calling thread."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tandem.core.kv_frontier import TransferChunk
from tandem.core.kv_layout import DTYPE_BYTES, KvLayout
from tandem.kv_transfer.block_coder import BlockCoder
from tandem.kv_transfer.fence import WriteFence
from tandem.kv_transfer.places import Places, put
from tandem.kv_transfer.reshard import KvSlice, overlap

# torch spreads a copy over several threads from this many elements on. Views stay below it: decode's steps need the
# other cores, and the threads would have to be started and to wait for each other.
MAX_VIEW_WORDS = 32767
FENCED_BYTES = 4 << 20  # copied between two checks of the fence


BlockViews = tuple[tuple[torch.Tensor, ...], ...]  # [block][view]


@dataclass(frozen=True, slots=True)
class PoolView:
    """A KV slice of one rank's pool: `words` is [layer, kv, block, head, unit, word], over all blocks. The slots of a
    block are divided into units of equal size; `unit_tokens` is that size."""

    words: torch.Tensor
    unit_tokens: int

    @classmethod
    def over(cls, pool: torch.Tensor, layout: KvLayout, kv_slice: KvSlice | None = None, units: int = 1) -> "PoolView":
        """`pool` is contiguous, of any dtype, and at least `layout.pool_bytes` long. `layout` is that of the pool alone
        (`KvLayout.pool_of`). `kv_slice` None: all of it. `units` divides the block size."""
        row = pool.view(-1).view(torch.uint8)[: layout.pool_bytes].view(word_of(layout, units))
        words = row.view(layout.num_layers, 2, layout.num_blocks, layout.num_kv_heads, units, -1)
        if kv_slice is not None:
            layers = slice(kv_slice.layer_begin, kv_slice.layer_end)
            words = words[layers, :, :, kv_slice.head_begin : kv_slice.head_end]
        return cls(words, layout.block_size // units)

    @property
    def word(self) -> torch.dtype:
        return self.words.dtype

    @property
    def device(self) -> torch.device:
        return self.words.device

    def take_blocks(self, layers: range, block_ids: Sequence[int], out: torch.Tensor) -> None:
        """Copy these layers of these blocks, in their order, into `out` (contiguous uint8)."""
        words = self.words[layers.start : layers.stop]
        index = torch.tensor(block_ids, device=words.device)
        shape = (len(layers), 2, len(block_ids), *words.shape[3:])
        torch.index_select(words, 2, index, out=out.view(words.dtype).view(shape))

    def put(self, layers: slice, at: Places, values: torch.Tensor) -> None:
        """Write into these layers of the slice; `values` as `places.take` returns them."""
        put(self.words[layers], at, values)

    def block_views(self) -> BlockViews:
        """Of every block, views that together cover the block, each small enough to be copied in one thread.

        To be made once: making a view in Python takes as long as copying 20 KB.
        """
        num_layers = self.words.shape[0]
        step = max(1, MAX_VIEW_WORDS // self.words[0, :, 0].numel())
        groups = [self.words[layer : layer + step].unbind(2) for layer in range(0, num_layers, step)]
        return tuple(zip(*groups, strict=True))

    @property
    def layer_block_bytes(self) -> int:
        """Bytes of one block in one layer, K and V."""
        return self.words[0, :, 0].numel() * self.words.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over the slice's layers, K and V."""
        return self.words.shape[0] * self.layer_block_bytes


def word_of(layout: KvLayout, units: int) -> torch.dtype:
    """In what a pool is copied whose blocks are divided into units: the largest integers that fit."""
    unit_bytes = layout.block_size // units * layout.head_dim * DTYPE_BYTES[layout.dtype]
    return torch.int64 if unit_bytes % 8 == 0 else torch.int16


class ChunkedBlocks:
    """`part` of the blocks of one rank of the source, in the order in which they are sent, [layer, kv, block, head,
    slot, head_dim], cut into chunks.

    A chunk has at most `max_chunk_bytes`, but never less than one block of one layer. Both sides of a transfer compute
    the same chunks. The layers of `part` are those of the rank's pool, whose layout is `layout`; `num_tokens` are those
    of the whole attempt. With a `coder`, each chunk is coded or whole, and `max_chunk_bytes` bounds what it has in
    memory.
    """

    def __init__(
        self,
        part: TransferChunk,
        layout: KvLayout,
        num_tokens: int,
        max_chunk_bytes: int,
        coder: BlockCoder | None = None,
    ) -> None:
        self.num_blocks = layout.blocks_for(num_tokens)
        self._layout = layout
        self.num_tokens = num_tokens
        self.coder = coder
        self._num_coded = 0 if coder is None else coder.num_coded_blocks(num_tokens)
        self._layer_block_bytes = 2 * layout.segment_bytes
        self.chunks = [
            chunk
            for blocks in (range(self._num_coded), range(self._num_coded, self.num_blocks))
            for chunk in split_transfer(
                TransferChunk(part.layers, overlap(part.blocks, blocks)), self._layer_block_bytes, max_chunk_bytes
            )
        ]
        self.kv_bytes = sum(map(self.chunk_bytes, self.chunks))
        self.wire_bytes = sum(map(self.sent_bytes, self.chunks))
        # Of a buffer for any chunk, in memory or as it is sent: codes of tiny blocks are larger than the blocks.
        sizes = (size(chunk) for chunk in self.chunks for size in (self.chunk_bytes, self.sent_bytes))
        self.staging_bytes = max(sizes, default=0)

    def chunk_bytes(self, chunk: TransferChunk) -> int:
        """In memory."""
        return chunk.num_layer_blocks * self._layer_block_bytes

    def sent_bytes(self, chunk: TransferChunk) -> int:
        """On the way."""
        if (coder := self.coder_of(chunk)) is None:
            return self.chunk_bytes(chunk)
        return chunk.num_layer_blocks * coder.layer_block_bytes

    def coder_of(self, chunk: TransferChunk) -> BlockCoder | None:
        return self.coder if chunk.blocks.start < self._num_coded else None

    def _unused_slots(self, chunk: TransferChunk, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Views into `part`, the chunk's bytes: the slots after the last token, and the slot of that token. None if the
        chunk has no such slots.

        What is there is no KV of the request, and need not arrive.
        """
        used = self.num_tokens - (self.num_blocks - 1) * self._layout.block_size
        if chunk.blocks.stop < self.num_blocks or used == self._layout.block_size:
            return None
        shape = (len(chunk.layers), 2, len(chunk.blocks), self._layout.num_kv_heads, self._layout.block_size, -1)
        last = part.view(shape)[:, :, -1]
        return last[:, :, :, used:], last[:, :, :, used - 1 : used]

    def clear_unused_slots(self, chunk: TransferChunk, part: torch.Tensor) -> None:
        """A checksum over memory is over the rest."""
        if (slots := self._unused_slots(chunk, part)) is not None:
            slots[0].zero_()


class BlockSource(Protocol):
    """A whole pool, of this process (`PoolView`) or of another host (`RemoteView`)."""

    @property
    def device(self) -> torch.device: ...

    def take_blocks(self, layers: range, block_ids: Sequence[int], out: torch.Tensor) -> None: ...


class LeavingBlocks(ChunkedBlocks):
    """Blocks of one rank's pool with `layout`, in order, as they are sent. `part` None: all of them."""

    def __init__(
        self,
        source: BlockSource,
        layout: KvLayout,
        block_ids: Sequence[int],
        num_tokens: int,
        max_chunk_bytes: int,
        part: TransferChunk | None = None,
        coder: BlockCoder | None = None,
    ) -> None:
        assert len(block_ids) == layout.blocks_for(num_tokens), "blocks of just these tokens"
        part = part or TransferChunk(range(layout.num_layers), range(len(block_ids)))
        super().__init__(part, layout, num_tokens, max_chunk_bytes, coder)
        self._source = source
        self._block_ids = block_ids

    def pack(self, chunk: TransferChunk, staging: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
        """Put a chunk, as it is sent, into the front of `staging` (uint8), and return that part of it. Coded chunks
        need `scratch`, which has the size of `staging`."""
        if (coder := self.coder_of(chunk)) is None:
            return self.gather(chunk, staging)
        raw, coded = self.gather(chunk, scratch), staging[: self.sent_bytes(chunk)]
        if (slots := self._unused_slots(chunk, raw)) is not None:
            slots[0].copy_(slots[1])  # they must not widen the range of the codes
        coder.encode(raw, coded, len(chunk.layers))
        return coded

    def gather(self, chunk: TransferChunk, staging: torch.Tensor) -> torch.Tensor:
        """Copy a chunk into the front of `staging` (uint8) and return that part of it."""
        part = staging[: self.chunk_bytes(chunk)]
        self._source.take_blocks(chunk.layers, self._block_ids[chunk.blocks.start : chunk.blocks.stop], part)
        return part

    def checksum(self) -> int:
        """CRC-32 of the tokens' bytes in memory, in the order in which the chunks are sent; see
        `clear_unused_slots`."""
        staging = torch.empty(self.staging_bytes, dtype=torch.uint8, device=self._source.device)
        value = 0
        for chunk in self.chunks:
            part = self.gather(chunk, staging)
            self.clear_unused_slots(chunk, part)
            value = crc32(part, value)
        return value


def split_transfer(part: TransferChunk, layer_block_bytes: int, max_bytes: int) -> list[TransferChunk]:
    """The chunks of `ChunkedBlocks`, layer by layer. `layer_block_bytes` are those of one block in one layer."""
    assert max_bytes > 0
    num_layers, num_blocks = len(part.layers), len(part.blocks)
    if num_layers == 0 or num_blocks == 0:
        return []
    layers = max(1, min(num_layers, max_bytes // (layer_block_bytes * num_blocks)))
    blocks = max(1, min(num_blocks, max_bytes // layer_block_bytes))
    return [
        TransferChunk(part.layers[layer : layer + layers], part.blocks[block : block + blocks])
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
    step = max(1, FENCED_BYTES // sum(view.nbytes for view in source[0]))
    for begin in range(0, len(source_ids), step):
        sources = [view for block in source_ids[begin : begin + step] for view in source[block]]
        targets = [view for block in block_ids[begin : begin + step] for view in destination[block]]
        with fence.writing():
            torch._foreach_copy_(targets, sources)
