"""The cells of a curve, each in a file of its own: one workload on one deployment at one rate."""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.goodput.servers import Server
from bench.load.result import LoadRecord
from bench.load.run import run_load
from tandem.placement.workload.requests import RequestStream
from tandem.profiling.completion_client import CompletionClient
from tandem.profiling.errors import MeasurementError

MAX_SEND_LAG_S = 0.02  # of 99 % of the requests
_FIELDS = (
    "index", "scheduled_s", "sent_s", "first_s", "last_s", "num_prompt_tokens", "num_output_tokens", "slo_class",
    "error", "event_s",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class GoodputCell:
    """`deployment`: name of what served `system`; its cells count for the targets of `scales`. `generator`: figures of
    `GeneratorHealth`. `fault`: why the generator may have distorted the run. `others_cores`: the cores that processes
    other than the server and the client used meanwhile, in the mean."""

    workload: str
    system: str
    deployment: str
    scales: tuple[float, ...]
    note: str
    rate: float
    seed: int
    seconds: float
    arrivals: str
    duration_s: float
    generator: Mapping[str, float]
    fault: str | None
    others_cores: float
    records: tuple[LoadRecord, ...]

    def write(self, folder: Path) -> None:
        """Whole or not at all."""
        values = {name: getattr(self, name) for name in self.__slots__} | {
            "records": [{name: _rounded(getattr(record, name)) for name in _FIELDS} for record in self.records]
        }
        path = folder / f"cell-{self.workload}-{self.deployment}-{self.rate:g}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(values))
        partial.rename(path)

    @classmethod
    def read(cls, path: Path) -> "GoodputCell":
        """Raises MeasurementError for the file of another version."""
        try:
            values = json.loads(path.read_bytes())
            values["records"] = tuple(
                LoadRecord(**(fields | {"event_s": tuple(fields["event_s"])})) for fields in values["records"]
            )
            values["scales"] = tuple(values["scales"])
            return cls(**values)
        except (ValueError, TypeError, KeyError) as error:
            raise MeasurementError(f"{path} is not a cell of this version ({error}); use another --out") from error


def read_cells(folder: Path) -> list[GoodputCell]:
    """All cells in `folder`. Raises MeasurementError."""
    return [GoodputCell.read(path) for path in sorted(folder.glob("cell-*.json"))]


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return round(value, 5)
    return [round(at_s, 5) for at_s in value] if isinstance(value, tuple) else value


@dataclass(frozen=True, slots=True)
class Measured:
    """What `measure` found: see `GoodputCell`."""

    duration_s: float
    generator: dict[str, float]
    fault: str | None
    others_cores: float
    records: tuple[LoadRecord, ...]


async def measure(server: Server, stream: RequestStream, *, timeout_s: float) -> Measured:
    """Sends the stream at its times. Raises MeasurementError if the server goes away."""
    client = CompletionClient(server.url)
    busy_s, began_s = _busy_s(server), time.monotonic()
    try:
        result = await run_load(client, stream, server.model, timeout_s=timeout_s)
    finally:
        client.close()
    others_cores = (_busy_s(server) - busy_s) / (time.monotonic() - began_s)
    if result.stopped is not None:
        raise MeasurementError(result.stopped)
    summary = {name: value for name, value in result.health.summary().items() if math.isfinite(value)}
    fault = result.health.fault(MAX_SEND_LAG_S)
    return Measured(result.duration_s, summary, fault, max(0.0, others_cores), result.records)


def _busy_s(server: Server) -> float:
    """CPU time of this machine so far, without the server's and this process's."""
    times, own = psutil.cpu_times(), os.times()
    busy_s = times.user + times.nice + times.system + times.irq + times.softirq
    return float(busy_s - server.cpu_s() - own.user - own.system)


async def measure_alone(server: Server, stream: RequestStream, *, warm_up: int) -> list[LoadRecord]:
    """Records of the requests of `stream`, each sent when the one before is complete; the first `warm_up` are not
    returned. Raises MeasurementError if one fails."""
    records = []
    for index in range(len(stream)):
        measured = await measure(server, stream.select(slice(index, index + 1)), timeout_s=120.0)
        (record,) = measured.records
        if not record.is_complete:
            raise MeasurementError(f"a request alone failed: {record.error}")
        records.append(record)
    return records[warm_up:]


def mean_latencies(records: Sequence[LoadRecord]) -> Iterator[tuple[str, float]]:
    """ttft_s and tpot_s, of the records that have them."""
    for name in ("ttft_s", "tpot_s"):
        values = [value for record in records if (value := getattr(record, name)) is not None]
        if not values:
            raise MeasurementError(f"no response has a {name}; ask for more tokens or more requests")
        yield name, sum(values) / len(values)
