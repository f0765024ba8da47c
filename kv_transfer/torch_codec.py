"""Codes of KV (`core.kv_codec`) in torch: for every device and dtype, and the reference of the native ones."""

import torch
from torch import Tensor

from tandem.core.kv_codec import PARAMETER_BYTES, SCALE_BYTES, KvCodec

_LEAST_STEP = torch.finfo(torch.float32).tiny
_LEAST_EXPONENT = -118  # of a scale; the inverse of much smaller ones is infinite
_EXPONENT_BIAS, _FRACTION_BITS = 127, 23  # of float32
_E4M3 = torch.float8_e4m3fn


class TorchKvCodes:
    """As `kv_transfer.block_coder.KvCodes` says."""

    def encode(self, codec: KvCodec, kv: Tensor, coded: Tensor) -> None:
        for is_value, rows in _rows(codec, kv, coded):
            x = kv[:, int(is_value)].float()
            encode = _encode_floats if codec is KvCodec.FP8 else _encode_integers
            encode(codec, x, is_value, rows)

    def decode(self, codec: KvCodec, coded: Tensor, kv: Tensor) -> None:
        for is_value, rows in _rows(codec, kv, coded):
            decode = _decode_floats if codec is KvCodec.FP8 else _decode_integers
            kv[:, int(is_value)] = decode(codec, rows, is_value, kv.shape[-2:])


def _rows(codec: KvCodec, kv: Tensor, coded: Tensor) -> list[tuple[bool, Tensor]]:
    """The codes of keys and those of values, as [layer, head block, byte]."""
    layers, _, head_blocks, slots, head_dim = kv.shape
    of_layer = coded.view(layers, -1)
    key_bytes, value_bytes = (codec.head_block_bytes(is_value, slots, head_dim) for is_value in (False, True))
    keys, values = of_layer[:, : head_blocks * key_bytes], of_layer[:, head_blocks * key_bytes :]
    return [
        (False, keys.view(layers, head_blocks, key_bytes)),
        (True, values.view(layers, head_blocks, value_bytes)),
    ]


def _encode_floats(codec: KvCodec, x: Tensor, is_value: bool, rows: Tensor) -> None:
    size = x.abs().amax((2, 3), keepdim=True)
    fraction, exponent = torch.frexp(size)
    exponent = torch.where(size > 0, exponent - 9 + (fraction > 0.875).int(), _LEAST_EXPONENT)
    scale = ((exponent.clamp(min=_LEAST_EXPONENT) + _EXPONENT_BIAS) << _FRACTION_BITS).view(torch.float32)
    scale = torch.where(size.isfinite(), scale, torch.nan)
    codes = (x / scale).to(_E4M3).view(torch.uint8).flatten(2)
    rows.zero_()
    rows[..., :SCALE_BYTES] = scale.flatten(1).unsqueeze(-1).view(torch.uint8)
    rows[..., SCALE_BYTES : SCALE_BYTES + codes.shape[-1]] = codes


def _decode_floats(codec: KvCodec, rows: Tensor, is_value: bool, shape: torch.Size) -> Tensor:
    scale = rows[..., :SCALE_BYTES].contiguous().view(torch.float32).unsqueeze(-1)
    codes = rows[..., SCALE_BYTES : SCALE_BYTES + shape.numel()].contiguous().view(_E4M3)
    return codes.float().view(*codes.shape[:2], *shape) * scale


def _encode_integers(codec: KvCodec, x: Tensor, is_value: bool, rows: Tensor) -> None:
    over = 3 if is_value else 2  # a grid spans the channels of a token, or the tokens of a channel
    levels = torch.tensor(2.0**codec.bits - 1, device=x.device)  # CUDA would multiply by the inverse of a plain number
    low, high = _round_down_to_bf16(x.amin(over, keepdim=True) + 0.0), x.amax(over, keepdim=True)
    step = _round_up_to_bf16(((high - low) / levels).clamp(min=_LEAST_STEP))
    step = torch.where(x.isfinite().all(over, keepdim=True), step, torch.nan)
    codes = ((x - low) * (1.0 / step)).round().nan_to_num(0.0).to(torch.uint8).flatten(2)
    if codec is KvCodec.INT4:
        half = -(-codes.shape[-1] // 2)
        codes, second = codes[..., :half].clone(), codes[..., half:]
        codes[..., : second.shape[-1]] |= second << 4
    parameters = torch.cat([low.flatten(2), step.flatten(2)], dim=-1).bfloat16().view(torch.uint8)
    rows.zero_()
    begin = parameters.shape[-1]
    rows[..., :begin] = parameters
    rows[..., begin : begin + codes.shape[-1]] = codes


def _decode_integers(codec: KvCodec, rows: Tensor, is_value: bool, shape: torch.Size) -> Tensor:
    slots, head_dim = shape
    groups, grid_shape = (slots, (slots, 1)) if is_value else (head_dim, (1, head_dim))
    begin = 2 * PARAMETER_BYTES * groups
    parameters = rows[..., :begin].contiguous().view(torch.bfloat16).float()
    parameters = parameters.view(*rows.shape[:2], 2, *grid_shape)
    codes = rows[..., begin:]
    if codec is KvCodec.INT4:
        codes = codes[..., : -(-shape.numel() // 2)]
        codes = torch.cat([codes & 15, codes >> 4], dim=-1)
    codes = codes[..., : shape.numel()].reshape(*rows.shape[:2], *shape)
    return parameters[:, :, 0] + codes.float() * parameters[:, :, 1]


def _round_down_to_bf16(x: Tensor) -> Tensor:
    bits = x.view(torch.int32)
    return ((bits + (bits < 0).int() * 0xFFFF) & -0x10000).view(torch.float32)


def _round_up_to_bf16(positive: Tensor) -> Tensor:
    return ((positive.view(torch.int32) + 0xFFFF) & -0x10000).view(torch.float32)
