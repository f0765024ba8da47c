"""The catalogue of devices."""

import pytest

from tandem.core.errors import ConfigError
from tandem.placement.costs.catalogue import read_yaml
from tandem.placement.costs.efficiency import efficiency
from tandem.placement.costs.hardware import device, devices


def test_every_entry_is_complete_and_names_its_source() -> None:
    sources = read_yaml("hardware.yaml")["devices"]
    assert len(devices()) == 14
    for name, entry in devices().items():
        assert entry.name == name
        assert min(entry.flops, entry.memory_bytes, entry.memory_bytes_per_s, entry.peer_bytes_per_s) > 0
        assert min(entry.num_cores, entry.cache_bytes) > 0
        assert sources[name]["source"]
        assert (entry.price_per_hour is None) == ("price_note" not in sources[name])
        assert efficiency(entry.family)


@pytest.mark.parametrize(
    ("name", "tflops", "gbytes_per_s", "nvlink", "nic", "price"),
    [
        ("A100-80GB-SXM4", 312, 2039, 300, 25, 1.89),
        ("H100-80GB-SXM5", 989, 3350, 450, 50, 2.95),
        ("H200-141GB-SXM5", 989, 4800, 450, 50, 3.50),
        ("B200-SXM", 2250, 7700, 900, 50, 5.50),
    ],
)
def test_published_figures(
    name: str, tflops: float, gbytes_per_s: float, nvlink: float, nic: float, price: float
) -> None:
    entry = device(name)
    assert entry.flops == tflops * 1e12
    assert entry.memory_bytes_per_s == gbytes_per_s * 1e9
    assert (entry.nvlink_bytes_per_s, entry.nic_bytes_per_s) == (nvlink * 1e9, nic * 1e9)
    assert entry.price_per_hour == price


def test_without_nvlink_peers_are_reached_over_pcie() -> None:
    assert device("L40S").nvlink_bytes_per_s == 0
    assert device("L40S").peer_bytes_per_s == 32e9
    assert device("H100-80GB-SXM5").peer_bytes_per_s == 450e9


def test_names_ignore_case_and_unknown_names_get_suggestions() -> None:
    assert device("cpu").family == "cpu"
    assert device("rtx4090") is devices()["RTX4090"]
    with pytest.raises(ConfigError, match="did you mean H100-80GB-SXM5"):
        device("H100")
    with pytest.raises(ConfigError, match=r"known are A100-40GB-SXM4, .*, cpu"):
        device("???")
