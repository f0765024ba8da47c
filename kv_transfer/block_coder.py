"""Codes the blocks of one rank's pool for a link that has a codec."""

from typing import Protocol

import torch
from torch import Tensor

from tandem.core.kv_codec import KvCodec
from tandem.core.kv_layout import KvLayout
from tandem.kv_transfer.torch_codec import TorchKvCodes


class KvCodes(Protocol):
    """`kv` is [layer, kv, head block, slot, head_dim], `coded` a row of bytes for exactly all of it: layer by layer the
    codes of the keys' head blocks, then those of the values'. Both are contiguous.

    Codes of a head block are the same bits in all implementations. A group of numbers (`core.kv_codec`) of which one is
    not finite becomes NaN. No other state matters, and any bytes can be decoded.
    """

    def encode(self, codec: KvCodec, kv: Tensor, coded: Tensor) -> None: ...

    def decode(self, codec: KvCodec, coded: Tensor, kv: Tensor) -> None: ...


class BlockCoder:
    """Codes whole blocks of a pool with `layout`, which is that of one rank (`KvLayout.pool_of`)."""

    def __init__(self, codec: KvCodec, layout: KvLayout, codes: KvCodes | None = None) -> None:
        """`codes` None: those of torch."""
        assert codec is not KvCodec.NONE, "whole blocks need no coder"
        self._codec = codec
        self._codes = codes or TorchKvCodes()
        self._layout = layout
        self._dtype: torch.dtype = getattr(torch, layout.dtype)
        # Of the code of one block in one layer, K and V.
        self.layer_block_bytes = layout.num_kv_heads * codec.pair_bytes(layout.block_size, layout.head_dim)

    def num_coded_blocks(self, num_tokens: int) -> int:
        """Number of the first blocks of `num_tokens` tokens that are coded; later ones are sent as they are."""
        return self._codec.num_coded_blocks(num_tokens, self._layout.block_size)

    def encode(self, raw: Tensor, coded: Tensor, num_layers: int) -> None:
        """Blocks [layer, kv, block, head, slot, head_dim] as bytes -> their codes."""
        self._codes.encode(self._codec, self._shaped(raw, num_layers), coded)

    def decode(self, coded: Tensor, raw: Tensor, num_layers: int) -> None:
        self._codes.decode(self._codec, coded, self._shaped(raw, num_layers))

    def _shaped(self, raw: Tensor, num_layers: int) -> Tensor:
        return raw.view(self._dtype).view(num_layers, 2, -1, self._layout.block_size, self._layout.head_dim)
