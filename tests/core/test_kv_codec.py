"""Bytes of coded KV, against those of the measured transfers of docs/log.md (2026-11-29)."""

import pytest

from tandem.core.kv_codec import KvCodec


@pytest.mark.parametrize(
    ("codec", "num_tokens", "measured_percent"),
    [("fp8", 256, 43.9), ("fp8", 1024, 29.9), ("int8", 256, 29.7), ("int8", 1024, 29.7), ("int4", 256, 37.9)],
)
def test_the_share_of_bytes_is_that_of_measured_transfers(codec: str, num_tokens: int, measured_percent: float) -> None:
    """The built-in model: heads of 32 numbers in fp32, blocks of 16 tokens."""
    assert 100 * KvCodec(codec).sent_share(num_tokens, 16, 32, 4.0) == pytest.approx(measured_percent, abs=0.05)


def test_a_prompt_that_is_shorter_than_the_window_is_sent_as_it_is() -> None:
    assert KvCodec.INT4.sent_share(64, 16, 128, 2.0) == KvCodec.NONE.sent_share(64, 16, 128, 2.0) == 1.0
