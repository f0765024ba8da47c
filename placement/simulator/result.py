"""What a simulation returns: the same timelines as a live cluster's, kept as arrays."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tandem.core.timeline import Stage, Timeline
from tandem.placement.workload.requests import RequestStream

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

STAGES: tuple[Stage, ...] = tuple(Stage)


@dataclass(frozen=True, slots=True)
class InstanceUse:
    """Totals of one instance. `busy_s` is the time in steps, `cost_terms_s` the same by cause (see StepCost.terms)."""

    instance_id: str
    role: str
    steps: int
    busy_s: float
    prefill_tokens: int
    decode_tokens: int
    cached_tokens: int
    preemptions: int
    peak_blocks: int
    num_blocks: int
    cost_terms_s: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SimulationResult:
    """`stamps[i, STAGES.index(stage)]` is when request i reached a stage, NaN where it did not. A request that was
    refused, or that had not finished when the simulation was stopped, has no FINISHED stamp. `refused_s`: when a
    request was refused or ended with an error, NaN for others; None where it is not known."""

    requests: RequestStream
    stamps: Floats  # [n, len(STAGES)]
    num_attempts: npt.NDArray[np.int64]
    num_cached_tokens: npt.NDArray[np.int64]
    end_s: float
    instances: tuple[InstanceUse, ...]
    stopped_early: bool = False
    refused_s: Floats | None = None

    def stage(self, stage: Stage) -> Floats:
        return self.stamps[:, STAGES.index(stage)]

    @property
    def ttft_s(self) -> Floats:
        """NaN where no first token came."""
        return self.stage(Stage.FIRST_TOKEN) - self.stage(Stage.RECEIVED)

    @property
    def tpot_s(self) -> Floats:
        """NaN for answers of one token and for unfinished ones."""
        gaps = np.where(self.requests.output_tokens > 1, self.requests.output_tokens - 1, np.nan)
        return (self.stage(Stage.FINISHED) - self.stage(Stage.FIRST_TOKEN)) / gaps

    @property
    def finished(self) -> Bools:
        return ~np.isnan(self.stage(Stage.FINISHED))

    @property
    def ended_s(self) -> Floats:
        """When each request finished, or was refused; NaN for those that still ran at the end."""
        finished_s = self.stage(Stage.FINISHED)
        return finished_s if self.refused_s is None else np.fmin(finished_s, self.refused_s)

    @property
    def num_refused(self) -> int:
        return 0 if self.refused_s is None else int((~np.isnan(self.refused_s)).sum())

    @property
    def cached_share(self) -> float:
        """Share of the prompt tokens of requests with a first token that were found in a prefix cache."""
        begun = ~np.isnan(self.stage(Stage.FIRST_TOKEN))
        return float(self.num_cached_tokens[begun].sum() / max(1, int(self.requests.prompt_tokens[begun].sum())))

    def timelines(self) -> Iterator[Timeline]:
        """One per request, in order of arrival; none for those that had not arrived when the simulation was stopped."""
        for i in np.flatnonzero(~np.isnan(self.stage(Stage.RECEIVED))):
            row = self.stamps[i]
            yield Timeline(
                stamps={stage: float(row[k]) for k, stage in enumerate(STAGES) if not np.isnan(row[k])},
                num_prompt_tokens=int(self.requests.prompt_tokens[i]),
                num_cached_tokens=int(self.num_cached_tokens[i]),
                num_output_tokens=int(self.requests.output_tokens[i]) if self.finished[i] else 0,
                num_attempts=int(self.num_attempts[i]),
            )
