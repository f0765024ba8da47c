"""Native codes of KV are the bits that torch has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.kv_codec import KvCodec
from tandem.engine.ops.kv_codec import DTYPES, NativeKvCodes
from tandem.engine.ops.native_library import NativeUnavailableError
from tandem.kv_transfer.torch_codec import TorchKvCodes

CODECS = (KvCodec.FP8, KvCodec.INT8, KvCodec.INT4)


@pytest.fixture(scope="module")
def native() -> NativeKvCodes:
    try:
        return NativeKvCodes()
    except NativeUnavailableError as error:
        pytest.skip(str(error))


def empty_codes(codec: KvCodec, kv: torch.Tensor) -> torch.Tensor:
    layers, _, head_blocks, *shape = kv.shape
    return torch.full((layers * head_blocks * codec.pair_bytes(*shape),), 0xAA, dtype=torch.uint8)


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from(CODECS),
    st.sampled_from(DTYPES),
    st.tuples(st.integers(1, 3), st.just(2), st.integers(1, 4), st.integers(1, 33), st.integers(1, 70)),
    st.integers(-30, 30),
    st.sampled_from([0.0, 1.0, -30.0]),
    st.integers(0, 1 << 30),
)
def test_both_have_the_same_bits(
    native: NativeKvCodes,
    codec: KvCodec,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    exponent: int,
    shift: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    kv = ((torch.randn(shape, generator=generator) + shift) * 2.0**exponent).to(dtype)
    by_torch, by_native = empty_codes(codec, kv), empty_codes(codec, kv)
    TorchKvCodes().encode(codec, kv, by_torch)
    native.encode(codec, kv, by_native)
    assert torch.equal(by_native, by_torch)
    from_torch, from_native = torch.empty_like(kv), torch.empty_like(kv)
    TorchKvCodes().decode(codec, by_torch, from_torch)
    native.decode(codec, by_torch, from_native)
    assert torch.equal(from_native, from_torch)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_no_number_afterwards(native: NativeKvCodes, codec: KvCodec, bad: float) -> None:
    kv = torch.randn(2, 2, 3, 16, 40)
    kv[1, :, 2, 3, 5] = bad
    codes, arrived = empty_codes(codec, kv), torch.empty_like(kv)
    native.encode(codec, kv, codes)
    native.decode(codec, codes, arrived)
    assert bool(arrived[1, :, 2, 3, 5].isnan().all())
    assert bool(arrived[0].isfinite().all())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-40, 448.0, 1e30])
def test_equal_numbers(native: NativeKvCodes, codec: KvCodec, value: float) -> None:
    kv = torch.full((1, 2, 1, 4, 6), value)
    by_torch, by_native = empty_codes(codec, kv), empty_codes(codec, kv)
    TorchKvCodes().encode(codec, kv, by_torch)
    native.encode(codec, kv, by_native)
    assert torch.equal(by_native, by_torch)


@pytest.mark.gpu
@pytest.mark.parametrize("codec", CODECS)
def test_cuda_has_the_same_bits(codec: KvCodec) -> None:
    kv = torch.randn(2, 2, 5, 16, 64)
    on_cpu = empty_codes(codec, kv)
    on_gpu = on_cpu.cuda()
    TorchKvCodes().encode(codec, kv, on_cpu)
    TorchKvCodes().encode(codec, kv.cuda(), on_gpu)
    assert torch.equal(on_gpu.cpu(), on_cpu)
    arrived = torch.empty_like(kv)
    arrived_on_gpu = arrived.cuda()
    TorchKvCodes().decode(codec, on_cpu, arrived)
    TorchKvCodes().decode(codec, on_gpu, arrived_on_gpu)
    assert torch.equal(arrived_on_gpu.cpu(), arrived)
