"""Operators: monotone, and with the effects that their formulas model."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.placement.costs.efficiency import ElementwiseEfficiency, MixedAttentionEfficiency, efficiency
from tandem.placement.costs.hardware import Device, devices
from tandem.placement.costs.operators import (
    decode_attention_coefficients,
    elementwise_s,
    mixed_attention_s,
    prefill_attention_s,
)

_RTX = devices()["RTX4090"]
_MIXED_FAMILIES = ("ada-rtx", "blackwell-rtx")
_counts = st.integers(0, 1_000_000)


def _mixed_fit(family: str = "ada-rtx") -> MixedAttentionEfficiency:
    fit = efficiency(family).mixed_attention
    assert fit is not None
    return fit


def _mixed_s(
    fit: MixedAttentionEfficiency,
    *,
    chunk: int = 0,
    history: int = 0,
    sequences: int = 0,
    kv_tokens: int = 0,
    device: Device = _RTX,
) -> float:
    pairs = chunk * history + chunk * (chunk + 1) // 2
    return mixed_attention_s(pairs, chunk + history, sequences, kv_tokens, 32, 8, 512.0, 128, device, fit)


@given(
    family=st.sampled_from(_MIXED_FAMILIES),
    sizes=st.tuples(st.integers(1, 4096), _counts, st.integers(0, 512), _counts),
    more=st.tuples(st.integers(0, 4096), _counts, st.integers(0, 512), _counts),
)
def test_the_time_of_a_mixed_kernel_is_monotone_in_its_load(
    family: str, sizes: tuple[int, int, int, int], more: tuple[int, int, int, int]
) -> None:
    names = ("chunk", "history", "sequences", "kv_tokens")
    fit = _mixed_fit(family)
    less_s = _mixed_s(fit, **dict(zip(names, sizes, strict=True)))
    more_s = _mixed_s(fit, **{name: a + b for name, a, b in zip(names, sizes, more, strict=True)})
    assert more_s >= less_s * (1 - 1e-12) > 0


@given(chunk=st.integers(1, 4096), history=_counts, sequences=st.integers(0, 512), kv_tokens=_counts)
def test_a_mixed_kernel_on_a_faster_device_takes_no_longer(
    chunk: int, history: int, sequences: int, kv_tokens: int
) -> None:
    load = {"chunk": chunk, "history": history, "sequences": sequences, "kv_tokens": kv_tokens}
    before_s = _mixed_s(_mixed_fit(), **load)
    for what in ("flops", "memory_bytes_per_s", "cache_bytes", "num_cores"):
        better = replace(_RTX, **{what: 2 * getattr(_RTX, what)})
        assert _mixed_s(_mixed_fit(), device=better, **load) <= before_s


def test_a_short_chunk_waits_for_the_walk_along_its_history() -> None:
    """Measured on an RTX 4090: 16 tokens after 4,096 take as long as 128 do, 136 us, and decoding hides behind them."""
    fit = _mixed_fit()
    short_s, long_s = (_mixed_s(fit, chunk=chunk, history=4096) for chunk in (16, 128))
    assert long_s < 1.3 * short_s
    assert short_s == pytest.approx(136e-6, rel=0.5)
    assert _mixed_s(fit, chunk=16, history=4096, sequences=2, kv_tokens=2048) < 1.2 * short_s


def test_many_long_sequences_read_their_kv_once_for_each_query_head() -> None:
    """Few of them, or short ones, find what the other heads of their group have read in the cache. Measured on an RTX
    4090, 128 new tokens beside: 16 sequences of 16,384 tokens take 7.9 ns a token, 128 take 17 (36.1 ms)."""
    fit = _mixed_fit()
    few_s, many_s = (_mixed_s(fit, chunk=128, sequences=n, kv_tokens=16384 * n) for n in (16, 128))
    assert many_s > 1.5 * 8 * few_s
    assert many_s == pytest.approx(36.1e-3, rel=0.2)


@given(num_bytes=st.floats(1, 1e9), more_bytes=st.floats(0, 1e9), family=st.sampled_from(("hopper", "ada-rtx", "cpu")))
def test_the_time_of_element_wise_kernels_is_monotone_in_bytes(
    num_bytes: float, more_bytes: float, family: str
) -> None:
    fit = efficiency(family).elementwise
    assert elementwise_s(num_bytes + more_bytes, _RTX, fit) >= elementwise_s(num_bytes, _RTX, fit) > fit.latency_s


def test_element_wise_kernels_slow_down_beyond_the_cache() -> None:
    fit = ElementwiseEfficiency(latency_s=0.0, core_bytes_per_s=1e10, memory=0.5, cached=0.5)
    fits, twice = _RTX.cache_bytes / 2, _RTX.cache_bytes
    assert elementwise_s(0.0, _RTX, fit) == 0.0
    assert elementwise_s(fits, _RTX, fit) == pytest.approx(fits / (_RTX.num_cores * 1e10))
    beyond_s = fits / (0.5 * _RTX.memory_bytes_per_s)
    assert elementwise_s(twice, _RTX, fit) == pytest.approx(2 * elementwise_s(fits, _RTX, fit) + beyond_s)


def test_each_sequence_and_head_has_a_minimum_time() -> None:
    fit = efficiency("hopper").latent_prefill
    h100 = devices()["H100-80GB-SXM5"]
    one_s, many_s = (prefill_attention_s(8256, 1e6, sequences, 16, 160, h100, fit) for sequences in (1, 129))
    assert many_s - one_s == pytest.approx(128 * 16 * fit.head_s / h100.num_cores)


def test_query_heads_that_share_a_latent_are_processed_one_after_the_other() -> None:
    fit = efficiency("hopper").latent_decode
    h100 = devices()["H100-80GB-SXM5"]
    (few_s, few_slope_s), (many_s, many_slope_s) = (
        decode_attention_coefficients(64, 1, heads, 1152.0, 2176.0 * heads, h100, fit) for heads in (16, 128)
    )
    assert many_s - few_s == pytest.approx(64 * 112 * fit.head_s)
    assert many_slope_s > few_slope_s  # 128 heads compute more than reading takes
