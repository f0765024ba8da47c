"""How KV is coded while it travels over a network: in fewer bits than in memory, where a user asks for it. Pure.

What is coded at once is a *head block*: the [slot, head_dim] elements of one head, of K or of V, in one block of one
layer of the source. Its code depends on nothing else, so it does not matter how ranks, layers and chunks are divided.

    fp8      one scale, then an e4m3 for each element. The scale is a power of two: scaling does not round.
    int8     a grid of 256 values for each channel of keys and for each token of values: lows, steps, then codes
    int4     as int8, with 16 values; two codes to a byte

Keys have few channels with large values, the same for all tokens, and values have none: KIVI (arXiv 2402.02750), which
also keeps the latest tokens whole. Here these are the last blocks of a prompt that hold `whole_tokens`.
"""

from enum import StrEnum
from typing import Literal

PARAMETER_BYTES = 2  # of a grid's low and of its step: bf16
SCALE_BYTES = 4  # float32
_ALIGNMENT = 4  # bytes; a head block's code ends with zeros up to here
_VERSION = 1  # of the formats above; a change of any of them is a new version


KvCodecName = Literal["none", "fp8", "int8", "int4"]  # in settings


class KvCodec(StrEnum):
    NONE = "none"
    FP8 = "fp8"
    INT8 = "int8"
    INT4 = "int4"

    @property
    def format_name(self) -> str:
        """The name that two instances compare when they link; empty for `NONE`."""
        return "" if self is KvCodec.NONE else f"{self.value}/{_VERSION}"

    @property
    def bits(self) -> int:
        """Bits of one code. Not for `NONE`."""
        return 4 if self is KvCodec.INT4 else 8

    @property
    def whole_tokens(self) -> int:
        """Number of a prompt's last tokens that are not coded. With int8 they would bring no accuracy back."""
        return 64 if self in (KvCodec.FP8, KvCodec.INT4) else 0

    def head_block_bytes(self, is_value: bool, slots: int, head_dim: int) -> int:
        """Bytes of the code of one head block. Not for `NONE`."""
        if self is KvCodec.FP8:
            parameter_bytes = SCALE_BYTES
        else:
            parameter_bytes = 2 * PARAMETER_BYTES * (slots if is_value else head_dim)
        code_bytes = -(-slots * head_dim * self.bits // 8)
        return -(-(parameter_bytes + code_bytes) // _ALIGNMENT) * _ALIGNMENT

    def num_coded_blocks(self, num_tokens: int, block_size: int) -> int:
        """Number of the first blocks of `num_tokens` tokens that are coded; later blocks are sent as they are. Not for
        `NONE`."""
        if not self.whole_tokens:
            return -(-num_tokens // block_size)
        return max(0, num_tokens - self.whole_tokens) // block_size

    def sent_share(self, num_tokens: int, block_size: int, head_dim: int, element_bytes: float) -> float:
        """Bytes that are sent for the KV of `num_tokens` tokens, above 0, divided by its bytes in memory, where a
        number has `element_bytes`. 1 for `NONE`."""
        if self is KvCodec.NONE:
            return 1.0
        num_blocks, token_bytes = self.num_coded_blocks(num_tokens, block_size), 2 * head_dim * element_bytes
        whole_tokens = max(0, num_tokens - num_blocks * block_size)
        sent_bytes = num_blocks * self.pair_bytes(block_size, head_dim) + whole_tokens * token_bytes
        return sent_bytes / (num_tokens * token_bytes)

    def pair_bytes(self, slots: int, head_dim: int) -> int:
        """Bytes of the codes of a head block of K and of the same block of V."""
        return sum(self.head_block_bytes(is_value, slots, head_dim) for is_value in (False, True))


def named_format(name: str) -> KvCodec | None:
    """The codec with that `format_name`; None if this version has none."""
    return next((codec for codec in KvCodec if codec.format_name == name), None)
