"""Clusters from an SLO file's cluster section, and their cost sources."""

import math
from pathlib import Path
from typing import Any

import pytest

from tandem.core.config_file import dump_config
from tandem.core.errors import ConfigError
from tandem.core.model_shape import ModelShape
from tandem.core.parallel import ParallelShape
from tandem.core.slo_file import ClusterSection, SloFile
from tandem.placement.cluster import Cluster, nic_bytes_per_s, peer_bytes_per_s
from tandem.placement.costs.calibration import Calibration
from tandem.placement.costs.models import model_shape
from tandem.placement.costs.sources import cost_source_of

H100, A100 = "H100-80GB-SXM5", "A100-80GB-SXM4"
ONE = ParallelShape()


def cluster(*nodes: dict[str, Any]) -> Cluster:
    return Cluster.of(ClusterSection.model_validate({"nodes": nodes}))


def slo_file(model: str, *nodes: dict[str, Any], **section: Any) -> SloFile:
    return SloFile.model_validate(
        {
            "model": model,
            "cluster": {"nodes": nodes, **section},
            "slo": [{"ttft_s": 1, "tpot_s": 0.1}],
            "workload": {"dataset": "sharegpt"},
        }
    )


def write_calibration(path: Path, model: str = "tiny-python") -> Path:
    calibration = Calibration.model_validate(
        {
            "measured_on": "2026-11-20",
            "device": "a CPU",
            "cores": 2,
            "model": model,
            "weights_hash": "0",
            "dtype": "float32",
            "ops": "native",
            "threads": 1,
            "kv_bytes_per_token": 2048,
            "kv_memory_bytes": 2048 * 5000,
            "terms": {
                "linear": [(1, 0.001), (100, 0.01)],
                "attention_per_pair": 1e-8,
                "kv_read": [(1, 1e-7)],
                "kv_per_sequence": 0,
                "head": 0,
                "head_per_sampled": 0,
            },
            "error": {"median": 0.03, "mean": 0.04, "worst": 0.2, "fitted_median": 0.02},
            "request_path": {
                "admission_s": 0.002,
                "first_token_s": 0.001,
                "token_s": 0.0005,
                "transfer_alone_s": 0.002,
                "transfer_contended_s": 0.003,
                "per_concurrent_transfer_s": 0.0005,
                "transfer_bytes_per_s": 1e9,
            },
        }
    )
    path.write_text(dump_config(calibration))
    return path


def test_nodes_are_named_in_the_files_order() -> None:
    two = cluster({"device": H100}, {"device": A100.lower(), "devices": 4, "count": 2})
    assert [(node.name, node.device.name, node.num_devices) for node in two.nodes] == [
        ("0", H100, 8),
        ("1", A100, 4),
        ("2", A100, 4),
    ]
    assert dict(two.devices_per_node) == {H100: 8, A100: 4}


def test_links_and_prices_of_the_file_replace_the_catalogues() -> None:
    catalogue = cluster({"device": H100}).devices[H100]
    own = cluster({"device": H100, "price_per_device_hour": 1.5, "nvlink_gbytes_per_s": 100, "nic_gbits_per_s": 8})
    assert own.devices[H100].nvlink_bytes_per_s == 100e9
    assert own.devices[H100].nic_bytes_per_s == 1e9
    assert own.price_per_hour({H100: 4}) == 6.0
    assert own.devices[H100].flops == catalogue.flops


def test_a_price_needs_the_prices_of_all_devices() -> None:
    some = cluster({"device": H100}, {"device": "cpu", "devices": 1, "nic_gbits_per_s": 1})
    assert some.price_per_hour({"cpu": 1, H100: 1}) is None
    assert some.price_per_hour({"cpu": 0, H100: 2}) == pytest.approx(
        2 * cluster({"device": H100}).price_per_hour({H100: 1})
    )


def test_slow_links_are_detected() -> None:
    assert not cluster({"device": H100, "nic_gbits_per_s": 1}).has_slow_links  # one node has nobody to reach
    assert cluster({"device": A100, "count": 4, "nic_gbits_per_s": 3}).has_slow_links
    device = cluster({"device": A100}).devices[A100]
    assert 0.3 * device.nvlink_bytes_per_s < peer_bytes_per_s(device) <= device.nvlink_bytes_per_s
    assert 0.3 * device.nic_bytes_per_s < nic_bytes_per_s(device) <= device.nic_bytes_per_s


@pytest.mark.parametrize(
    ("nodes", "sentence"),
    [
        ([{"device": "H1000"}], "'H1000' is not a known device"),
        (
            [{"device": H100}, {"device": H100, "nic_gbits_per_s": 10}],
            r"cluster\.nodes\.1: .* differs from an earlier entry",
        ),
        ([{"device": "RTX4090", "count": 2}], "the NIC speed of RTX4090 is unknown; set nic_gbits_per_s"),
        ([{"device": "cpu", "calibration": "/none.yaml"}], "/none.yaml does not exist"),
    ],
)
def test_impossible_clusters_are_refused(nodes: list[dict[str, Any]], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        cluster(*nodes)


# --- whose costs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> ModelShape:
    return model_shape(str(Path(__file__).resolve().parents[2] / "models" / "tiny-python"))


def test_a_device_without_calibration_has_the_rooflines_costs() -> None:
    model = model_shape("Llama-3.1-70B")
    source = cost_source_of(slo_file("Llama-3.1-70B", {"device": H100}), model)
    assert source.cost_model(H100, ParallelShape(8)) is not None
    assert source.cost_model(H100, ParallelShape(16)) is None  # more than a node has
    assert source.kv_tokens(H100, ONE) == 0  # 140 GB of weights
    assert source.kv_tokens(H100, ParallelShape(8)) > 100_000


def test_a_calibration_counts_for_its_device_only(tmp_path: Path, tiny: ModelShape) -> None:
    path = write_calibration(tmp_path / "cpu.yaml")
    mixed = slo_file("tiny", {"device": "cpu", "calibration": str(path)}, {"device": H100})
    source = cost_source_of(mixed, tiny)
    assert source.kv_tokens("cpu", ONE) == 5000
    assert source.kv_tokens(H100, ONE) > 1_000_000
    assert source.cost_model("cpu", ParallelShape(2)) is None  # was not measured
    assert source.cost_model("L4", ONE) is None
    assert source.kv_tokens("L4", ONE) == 0
    assert source.error >= 0.03 or math.isnan(source.error)
    assert cost_source_of(slo_file("tiny", {"device": "cpu", "calibration": str(path)}), tiny).error == 0.03


def test_the_calibration_of_another_model_is_refused(tmp_path: Path, tiny: ModelShape) -> None:
    path = write_calibration(tmp_path / "cpu.yaml", model="other")
    with pytest.raises(ConfigError, match="calibration of cpu belongs to the model other, not to tiny-python"):
        cost_source_of(slo_file("tiny", {"device": "cpu", "calibration": str(path)}), tiny)


def test_kv_memory_comes_from_the_file(tiny: ModelShape) -> None:
    pool = cost_source_of(slo_file("tiny", {"device": "cpu"}, kv_memory="64MiB"), tiny)
    assert pool.kv_tokens("cpu", ONE) == (64 << 20) // tiny.kv_bytes_per_token
    too_big = cost_source_of(slo_file("x", {"device": H100}, kv_memory="1GiB"), model_shape("Llama-3.1-70B"))
    assert too_big.kv_tokens(H100, ONE) == 0  # the weights alone do not fit
