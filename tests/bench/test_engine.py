"""The arithmetic behind the engine benchmark's table, and one real worker."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.engine.peers import EngineName, PeerError, start_peer, stop_all
from bench.engine.results import CELLS, CellResult, EngineCell, MachineLimits, mean_ratio, table, with_ceiling

SHAPE = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 2,
    "intermediate_size": 16,
    "vocab_size": 100,
}
IN_LAYERS = 2 * (8 * (8 + 4 + 4) + 8 * 8 + 3 * 8 * 16)
HEAD = 800


def test_names_have_a_dtype() -> None:
    assert EngineName.parse("vllm") == EngineName("vllm", "bfloat16")
    assert EngineName.parse("vllm:float32") == EngineName("vllm", "float32")
    assert [str(EngineName.parse(text)) for text in ("vllm", "vllm:float32")] == ["vllm", "vllm:float32"]


def test_decode_is_bound_by_the_bytes_it_reads_or_by_its_multiplications() -> None:
    result = CellResult("m", 1, EngineCell("decode", batch=3), {})
    kv_bytes = 3 * 256 * 2 * 2 * 4 * 2  # sequences, tokens, layers, K and V, numbers, bytes
    slow_memory = with_ceiling(result, SHAPE, MachineLimits(bytes_per_s=1e3, flops_per_s=1e12))
    assert slow_memory.bound == "memory"
    assert slow_memory.ceiling == pytest.approx(3 * 1e3 / (2 * (IN_LAYERS + HEAD) + kv_bytes))
    slow_core = with_ceiling(result, SHAPE, MachineLimits(bytes_per_s=1e12, flops_per_s=1e3))
    assert slow_core.bound == "multipliers"
    assert slow_core.ceiling == pytest.approx(1e3 / (2 * (IN_LAYERS + HEAD) + 4 * 2 * 8 * 256))


def test_prefill_counts_causal_attention_and_one_row_of_the_head() -> None:
    result = with_ceiling(CellResult("m", 1, EngineCell("prefill", tokens=10), {}), SHAPE, MachineLimits(1e12, 1e3))
    flops = 2 * IN_LAYERS * 10 + 2 * HEAD + 4 * 2 * 8 * (10 * 11 / 2)
    assert result.ceiling == pytest.approx(10 * 1e3 / flops)


def test_ratios_leave_out_what_was_not_measured() -> None:
    measured = CellResult("m", 1, CELLS[0], {"tandem": [4.0, 6.0, 100.0], "vllm": [3.0], "other": []}, "memory", 12.0)
    lost = CellResult("m", 1, CELLS[2], {"tandem": [2.0], "vllm": [4.0], "other": []}, "memory", 2.0)
    assert (measured.ratio("vllm"), measured.ratio("other")) == (2.0, None)
    assert mean_ratio([measured, lost], "vllm") == pytest.approx(1.0)
    assert mean_ratio([measured, lost], "other") is None
    rows = list(table([measured, lost], ["tandem", "vllm", "other"]))
    assert rows[2] == "| m 1t prefill 512 | 6 (4-100) | 3 (3-3) | - | 2.00 | - | memory | 50% |"


@pytest.mark.slow
def test_a_worker_measures_and_a_broken_one_says_why(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "models" / "random_checkpoint.py"
    model = tmp_path / "model"
    command = [sys.executable, str(script), "--hidden-size", "64", "--vocab-size", "8192", "--out", str(model)]
    subprocess.run(command, check=True, capture_output=True)
    peer = start_peer(EngineName("tandem"), model, 1, tmp_path / "log", None)
    with stop_all([peer]):
        assert peer.start_s > 0
        assert CELLS[0].measure(peer, 0) > 0
        assert EngineCell("decode", batch=4).measure(peer, 0) > 0
    with pytest.raises(PeerError, match="no-model"):
        start_peer(EngineName("tandem"), tmp_path / "no-model", 1, tmp_path / "log", None)
