"""The result of a load run: a record per request, and the delays of the generator itself."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tandem.core.timeline import Stage
from tandem.placement.simulator.result import STAGES, SimulationResult
from tandem.placement.workload.requests import RequestStream

GENERATOR_TOO_SLOW = 3
"""Exit status of `bench.load` if the generator may have distorted a run."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LoadRecord:
    """One request, as its client saw it. Times are seconds since the run began.

    `first_s` and `last_s`: the first and the last event of the response. `event_s`: every event, see `TimedCompletion`.
    `timeline`: the server's (docs/http-api.md). `num_cached_tokens`: of the prompt, as the response's usage says.
    A request that was never sent has neither `sent_s` nor an error.
    """

    index: int
    scheduled_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    slo_class: int
    sent_s: float | None = None
    first_s: float | None = None
    last_s: float | None = None
    error: str | None = None
    timeline: dict[str, object] | None = None
    num_cached_tokens: int = 0
    event_s: tuple[float, ...] = ()

    @property
    def is_complete(self) -> bool:
        return self.last_s is not None and self.error is None

    @property
    def ttft_s(self) -> float | None:
        """From the scheduled time."""
        return None if self.first_s is None else self.first_s - self.scheduled_s

    @property
    def tpot_s(self) -> float | None:
        if not self.is_complete or self.num_output_tokens < 2 or self.first_s is None or self.last_s is None:
            return None
        return (self.last_s - self.first_s) / (self.num_output_tokens - 1)


@dataclass(frozen=True, slots=True)
class GeneratorHealth:
    """Delays of the generator itself. `send_lag_s`: of each request, from its scheduled time until it was written;
    `loop_lag_s`: of each tick of a clock on the same event loop; `cpu_share`: of one core."""

    send_lag_s: Floats
    loop_lag_s: Floats
    cpu_share: float
    peak_in_flight: int

    def fault(self, max_lag_s: float) -> str | None:
        """Why the run cannot be trusted, if the generator was the bottleneck."""
        if len(self.send_lag_s) and (lag_s := float(np.percentile(self.send_lag_s, 99))) > max_lag_s:
            return (
                f"99 % of the requests were sent {lag_s * 1e3:.1f} ms late or less; {max_lag_s * 1e3:g} ms are allowed"
            )
        if self.cpu_share > 0.8:
            return f"the generator used {self.cpu_share:.0%} of a core: it may be the bottleneck"
        return None

    def text(self) -> str:
        def figures(values: Floats) -> str:
            if not len(values):
                return "none"
            p50, p99, most = np.percentile(values, (50, 99, 100)) * 1e3
            return f"p50 {p50:.2f} p99 {p99:.2f} max {most:.2f} ms"

        return (
            f"generator: send lag {figures(self.send_lag_s)}; event loop lag {figures(self.loop_lag_s)}; "
            f"CPU {self.cpu_share:.1%} of a core; at most {self.peak_in_flight} requests in flight"
        )

    def summary(self) -> dict[str, float]:
        def quantile(values: Floats, share: float) -> float:
            return float(np.percentile(values, share)) if len(values) else float("nan")

        lags = {"send": self.send_lag_s, "loop": self.loop_lag_s}
        return {
            f"{name}_lag_{label}_s": quantile(values, share)
            for name, values in lags.items()
            for label, share in (("p50", 50), ("p99", 99), ("max", 100))
        } | {"cpu_share": self.cpu_share, "peak_in_flight": float(self.peak_in_flight)}


@dataclass(frozen=True, slots=True)
class LoadResult:
    """`records` in order of arrival, one per request. `stopped`: why the run ended early, if it did."""

    stream: RequestStream
    records: tuple[LoadRecord, ...]
    health: GeneratorHealth
    duration_s: float
    stopped: str | None = None

    def as_simulation(self) -> SimulationResult:
        """See the function of that name."""
        return as_simulation(self.stream, self.records, self.duration_s, stopped_early=self.stopped is not None)


def as_simulation(
    stream: RequestStream, records: Sequence[LoadRecord], duration_s: float, *, stopped_early: bool = False
) -> SimulationResult:
    """Records in the simulator's form, so that one summary serves both. A request is received at its scheduled time;
    the server's stages are placed backwards from the client's time of the first token."""
    stamps = np.full((len(records), len(STAGES)), np.nan)
    for row, record in zip(stamps, records, strict=True):
        if record.timeline is not None and record.first_s is not None:
            stages, ttft_s = record.timeline["stages"], record.timeline["ttft_s"]
            assert isinstance(stages, dict)
            assert isinstance(ttft_s, float)
            for name, at_s in stages.items():
                row[STAGES.index(Stage(name))] = record.first_s - ttft_s + at_s
        row[STAGES.index(Stage.RECEIVED)] = record.scheduled_s
        row[STAGES.index(Stage.FIRST_TOKEN)] = np.nan if record.first_s is None else record.first_s
        row[STAGES.index(Stage.FINISHED)] = record.last_s if record.is_complete else np.nan
    return SimulationResult(
        requests=stream,
        stamps=stamps,
        num_attempts=np.ones(len(records), dtype=np.int64),
        num_cached_tokens=np.array([record.num_cached_tokens for record in records], dtype=np.int64),
        end_s=duration_s,
        instances=(),
        stopped_early=stopped_early,
    )


def records_as_json(result: LoadResult) -> list[dict[str, object]]:
    """One object per request, for a file."""
    fields = ("index", "scheduled_s", "sent_s", "first_s", "last_s", "num_prompt_tokens", "num_output_tokens",
              "slo_class", "error", "timeline", "num_cached_tokens")  # fmt: skip
    return [{name: getattr(record, name) for name in fields} for record in result.records]
