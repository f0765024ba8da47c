"""Measured times of operators as samples, and the tables that they are read from."""

import csv
import gzip
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

from tandem.core.errors import ConfigError
from tandem.core.model_shape import ModelShape
from tandem.placement.costs.efficiency import Efficiency
from tandem.placement.costs.hardware import Device, devices
from tandem.placement.costs.models import model_shape

_SYSTEMS = {
    "a100_sxm": "A100-80GB-SXM4",
    "h100_sxm": "H100-80GB-SXM5",
    "h200_sxm": "H200-141GB-SXM5",
    "b200_sxm": "B200-SXM",
    "l40s": "L40S",
    "a100": "A100-80GB-SXM4",
    "h100": "H100-80GB-SXM5",
    "a40": "A40",
    "RTX4090": "RTX4090",
    "RTXPRO6000": "RTX-PRO-6000-Blackwell",
    "a100_dgx": "A100-80GB-SXM4",
    "h100_dgx": "H100-80GB-SXM5",
}


@dataclass(frozen=True, slots=True)
class OperatorSample:
    """One measured time of one operator from the table `source`. Only samples that are not `held_out` are fitted."""

    operator: str
    source: str
    device: Device
    seconds: float
    predict: Callable[[Efficiency], float]
    held_out: bool


def read_rows(folder: Path, name: str) -> Iterator[dict[str, str]]:
    """Rows of a table in `folder`/latency. Raises ConfigError where it is missing."""
    path = folder / "latency" / name
    if not path.is_file():
        raise ConfigError(f"{path} is missing; --data must name the folder with the published measurements")
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if name.endswith(".gz") else raw).decode("utf-8")
    yield from csv.DictReader(text.splitlines())


def is_held_out(*shape: object) -> bool:
    """Whether a shape is held out: half of the shapes, the same in every run."""
    return crc32(repr(shape).encode()) % 2 == 1


def device_of(system: str) -> Device:
    """The catalogue's device of a name in the tables."""
    return devices()[_SYSTEMS[system]]


def served_model(name: str) -> ModelShape:
    """The model of a name in LLMServingSim's tables."""
    model = model_shape(name.removesuffix("-Instruct-2507"))
    return replace(model, name=name)
