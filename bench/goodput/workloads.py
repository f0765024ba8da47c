"""The workloads of the curve, as data: lengths, shared prefixes and arrivals."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from tandem.core.errors import ConfigError
from tandem.core.slo import SloClass
from tandem.core.slo_file import WorkloadSection
from tandem.placement.workload.requests import RequestStream
from tandem.placement.workload.streams import make_stream

_BURSTY: Mapping[str, object] = MappingProxyType({"process": "gamma", "cv": 3.0})
_ARRIVALS: Mapping[str, Mapping[str, object]] = MappingProxyType({"poisson": {"process": "poisson"}, "bursty": _BURSTY})
ARRIVALS = ("recorded", *_ARRIVALS)
_ANY_TARGETS = (SloClass(ttft_s=1.0, tpot_s=1.0),)  # of the only class: requests do not depend on targets
MIN_REQUESTS = 20


@dataclass(frozen=True, slots=True)
class GoodputWorkload:
    """`section`: of an SLO file. `trace`: a file in the folder of public data, whose requests and arrivals are used.
    `arrivals`: one of `ARRIVALS`."""

    name: str
    title: str
    section: Mapping[str, object]
    arrivals: str = "poisson"
    trace: str | None = None
    shares_prefixes: bool = False

    def slo_section(self, data: Path) -> dict[str, object]:
        """The section `workload` of an SLO file, whose traces are below `data`. Raises ConfigError."""
        section: dict[str, object] = dict(self.section)
        if self.trace is not None:
            path = (data / self.trace).resolve()
            if not path.is_file():
                raise ConfigError(f"workload {self.name} needs {path}, which does not exist; --data names the folder")
            section["trace"] = str(path)
        elif self.arrivals == "recorded":
            raise ConfigError(f"workload {self.name} has no recorded arrivals; choose poisson or bursty")
        else:
            section["arrivals"] = dict(_ARRIVALS[self.arrivals])
        return section

    def with_arrivals(self, arrivals: str) -> "GoodputWorkload":
        """`arrivals`: one of `ARRIVALS`."""
        return replace(self, arrivals=arrivals)

    def requests(self, data: Path, *, rate: float, seconds: float, seed: int) -> RequestStream:
        """`rate` * `seconds` requests, at least `MIN_REQUESTS`, at exactly this mean rate, the first at 0. The requests
        of a lower rate are the first ones of a higher rate. Raises ConfigError."""
        count = max(MIN_REQUESTS, round(rate * seconds))
        section = WorkloadSection.model_validate(self.slo_section(data))
        stream = make_stream(section, _ANY_TARGETS, count=count, rate=rate, seed=seed)
        if self.trace is not None and self.arrivals != "recorded":
            generated = {"dataset": "sharegpt", "arrivals": dict(_ARRIVALS[self.arrivals])}
            other = WorkloadSection.model_validate(generated)
            arrival_s = make_stream(other, _ANY_TARGETS, count=len(stream), rate=rate, seed=seed).arrival_s
            stream = replace(stream, arrival_s=arrival_s)
        return stream.scaled_to(rate)


def _lengths(mean: float, low: int, high: int, cv: float) -> dict[str, object]:
    return {"mean": mean, "min": low, "max": high, "cv": cv}


WORKLOADS: Mapping[str, GoodputWorkload] = MappingProxyType(
    {
        workload.name: workload
        for workload in (
            GoodputWorkload(
                "a",
                "192 to 320 tokens in, 64 out",
                {"prompt_tokens": _lengths(256, 192, 320, 0.14), "output_tokens": _lengths(64, 64, 64, 0)},
            ),
            GoodputWorkload(
                "b",
                "900 to 1,100 tokens in, 32 out",
                {"prompt_tokens": _lengths(1000, 900, 1100, 0.055), "output_tokens": _lengths(32, 32, 32, 0)},
            ),
            GoodputWorkload(
                "c",
                "ShareGPT, first turns: lengths times 0.5, at most 2,048 tokens together",
                {"dataset": "sharegpt", "length_scale": 0.5, "max_total_tokens": 2048},
            ),
            GoodputWorkload(
                "d",
                "Azure code 2023: lengths times 0.25, at most 2,048 tokens together",
                {"length_scale": 0.25, "max_total_tokens": 2048},
                arrivals="recorded",
                trace="traces/azure_2023_code.csv.gz",
            ),
            GoodputWorkload(
                "e",
                "Mooncake conversation: lengths and shared prefixes divided by 16, at most 3,072 tokens together",
                {"length_scale": 0.0625, "max_total_tokens": 3072},
                arrivals="recorded",
                trace="traces/mooncake_conversation_trace.jsonl.gz",
                shares_prefixes=True,
            ),
        )
    }
)
