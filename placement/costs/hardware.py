"""The catalogue of devices: performance figures for cost models, and rental prices."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Any

from tandem.placement.costs.catalogue import find_name, read_yaml


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator (or a CPU) and its share of the node's links. Peak values in SI units.

    `family` is the architecture that efficiencies are fitted for. `flops`: dense bf16 with float32 sums, per second.
    Link speeds are for one direction: `nvlink_bytes_per_s` to all devices of the node together, 0 without NVLink;
    `nic_bytes_per_s` to other nodes, 0 if unknown. `price_per_hour`: USD on demand, None if unknown; prices vary by
    +-50 %. Sources and dates are in `placement/data/hardware.yaml`.
    """

    name: str
    family: str
    flops: float
    memory_bytes: float
    memory_bytes_per_s: float
    nvlink_bytes_per_s: float
    pcie_bytes_per_s: float
    nic_bytes_per_s: float
    num_cores: int  # streaming multiprocessors or compute units: work comes in waves of them
    cache_bytes: float  # last-level cache
    price_per_hour: float | None = None
    fp8_flops: float = 0.0  # dense, 0 without such products

    @property
    def peer_bytes_per_s(self) -> float:
        """To another device of the same node: NVLink, else PCIe."""
        return self.nvlink_bytes_per_s or self.pcie_bytes_per_s

    @property
    def for_fp8(self) -> "Device":
        """The same device with its peak for products in fp8."""
        return replace(self, flops=self.fp8_flops)


@cache
def devices() -> Mapping[str, Device]:
    """The catalogue by name, `cpu` included."""
    entries: dict[str, dict[str, Any]] = read_yaml("hardware.yaml")["devices"]
    return MappingProxyType({name: _device(name, entry) for name, entry in entries.items()})


def device(name: str) -> Device:
    """The device of that name, without regard to case. Raises ConfigError with similar names."""
    known = devices()
    return known[find_name(name, known, "device")]


def _device(name: str, entry: dict[str, Any]) -> Device:
    return Device(
        name=name,
        family=entry["family"],
        flops=entry["bf16_tflops"] * 1e12,
        memory_bytes=entry["memory_gb"] * 1e9,
        memory_bytes_per_s=entry["memory_gbytes_per_s"] * 1e9,
        nvlink_bytes_per_s=(entry.get("nvlink_gbytes_per_s") or 0) * 1e9,
        pcie_bytes_per_s=entry["pcie_gbytes_per_s"] * 1e9,
        nic_bytes_per_s=(entry.get("nic_gbits_per_s") or 0) * 1e9 / 8,
        num_cores=entry["num_cores"],
        cache_bytes=entry["cache_mb"] * 1e6,
        price_per_hour=entry.get("price_per_hour"),
        fp8_flops=(entry.get("fp8_tflops") or 0) * 1e12,
    )
