"""Native codes of KV (`core.kv_codec`), for KV that travels over a network."""

import torch

from tandem.core.kv_codec import KvCodec
from tandem.engine.ops.native_library import load_native_library

_NUMBERS = {KvCodec.FP8: 0, KvCodec.INT8: 1, KvCodec.INT4: 2}  # those of engine/native/kv_codec.h
DTYPES = (torch.float32, torch.bfloat16)


class NativeKvCodes:
    """`kv` is [layer, kv, head block, slot, head_dim] of one of `DTYPES`, `coded` a row of bytes for exactly all of it;
    both are contiguous and on the CPU. Calls compute in this thread, without the interpreter lock."""

    def __init__(self) -> None:
        """Raises NativeUnavailableError."""
        library = load_native_library()
        self._encode, self._decode = library.tandem_encode_kv, library.tandem_decode_kv

    def encode(self, codec: KvCodec, kv: torch.Tensor, coded: torch.Tensor) -> None:
        self._encode(*_arguments(codec, kv), kv.data_ptr(), coded.data_ptr(), *_sizes(codec, kv, coded))

    def decode(self, codec: KvCodec, coded: torch.Tensor, kv: torch.Tensor) -> None:
        self._decode(*_arguments(codec, kv), coded.data_ptr(), kv.data_ptr(), *_sizes(codec, kv, coded))


def _arguments(codec: KvCodec, kv: torch.Tensor) -> tuple[int, bool]:
    assert kv.dtype in DTYPES, "the caller chooses torch's codes for others"
    return _NUMBERS[codec], kv.dtype is torch.bfloat16


def _sizes(codec: KvCodec, kv: torch.Tensor, coded: torch.Tensor) -> tuple[int, ...]:
    layers, _, head_blocks, slots, head_dim = kv.shape
    assert kv.is_contiguous()
    assert coded.is_contiguous()
    assert coded.nbytes == layers * head_blocks * codec.pair_bytes(slots, head_dim)
    return layers, head_blocks, slots, head_dim
