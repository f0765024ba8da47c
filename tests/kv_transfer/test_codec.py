"""KV in fewer bits: sizes and errors are bounded, and what is not a number stays one that is not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.kv_codec import KvCodec, named_format
from tandem.kv_transfer.torch_codec import TorchKvCodes

CODECS = (KvCodec.FP8, KvCodec.INT8, KvCodec.INT4)


def round_trip(codec: KvCodec, kv: torch.Tensor) -> torch.Tensor:
    layers, _, head_blocks, *shape = kv.shape
    coded = torch.empty(layers * head_blocks * codec.pair_bytes(*shape), dtype=torch.uint8)
    result = torch.empty_like(kv)
    TorchKvCodes().encode(codec, kv, coded)
    TorchKvCodes().decode(codec, coded, result)
    return result


def largest_error(codec: KvCodec, kv: torch.Tensor) -> torch.Tensor:
    """For each element, in numbers of infinitely many bits."""
    x = kv.double()
    if codec is KvCodec.FP8:
        scale = x.abs().amax((3, 4), keepdim=True) / 448 * 2
        return torch.maximum(x.abs() * 2**-4, scale * 2**-10)
    levels = 2**codec.bits - 1
    bounds = []
    for i, over in enumerate((2, 3)):  # keys: over the tokens of a channel; values: over the channels of a token
        part = x[:, i]
        low, high = part.amin(over, keepdim=True), part.amax(over, keepdim=True)
        step = (high - low + low.abs() * 2**-7) / levels * (1 + 2**-7)
        bounds.append((step / 2).expand_as(part))
    return torch.stack(bounds, dim=1)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(CODECS),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.tuples(st.integers(1, 2), st.just(2), st.integers(1, 3), st.integers(1, 17), st.integers(1, 33)),
    st.integers(-20, 20),
    st.sampled_from([0.0, 1.0, -30.0]),
    st.integers(0, 1 << 30),
)
def test_the_error_is_bounded(
    codec: KvCodec, dtype: torch.dtype, shape: tuple[int, ...], exponent: int, shift: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = 2.0 ** (exponent / 2 if dtype is torch.float16 else exponent)
    kv = ((torch.randn(shape, generator=generator) + shift) * scale).to(dtype)
    arrived = round_trip(codec, kv)
    assert arrived.dtype is dtype
    rounding = torch.finfo(dtype).eps * arrived.double().abs() + torch.finfo(dtype).tiny
    assert bool(((arrived.double() - kv.double()).abs() <= 1.00001 * largest_error(codec, kv) + rounding).all())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -3.0, 1e-40, 448.0, 1e30])
def test_equal_numbers(codec: KvCodec, value: float) -> None:
    kv = torch.full((1, 2, 1, 4, 6), value)
    assert torch.allclose(round_trip(codec, kv), kv, rtol=2**-4, atol=1e-37)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_no_number_afterwards(codec: KvCodec, bad: float) -> None:
    kv = torch.randn(2, 2, 3, 4, 6)
    kv[1, :, 2, 3, 5] = bad
    arrived = round_trip(codec, kv)
    assert bool(arrived[1, :, 2, 3, 5].isnan().all())
    others = torch.ones(2, 3, dtype=torch.bool)
    others[1, 2] = False
    assert bool(arrived.transpose(1, 2)[others].isfinite().all())


def test_sizes() -> None:
    """Of blocks of 16 tokens and heads of 64 elements, in bits an element."""
    bits = {
        codec: [codec.head_block_bytes(is_value, 16, 64) * 8 / 1024 for is_value in (False, True)] for codec in CODECS
    }
    assert bits == {KvCodec.FP8: [8.03125, 8.03125], KvCodec.INT8: [10.0, 8.5], KvCodec.INT4: [6.0, 4.5]}


def test_formats_have_names() -> None:
    assert [named_format(codec.format_name) for codec in KvCodec] == list(KvCodec)
    assert named_format("int3/1") is None
