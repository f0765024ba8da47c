"""What a plan rests on: everything that the report draws, as plain values in stated units.

The planner fills these, the report only draws them; nothing here is computed from anything else here, except where a
property says so. Seconds, requests per second, tokens, shares of 1; rates and goodput are of the whole plan unless the
name says per device.
"""

import math
from dataclasses import dataclass
from typing import Literal

from tandem.core.plan import Plan
from tandem.core.slo import SloClass
from tandem.core.slo_file import Layout

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A configuration that was looked at. `goodput` None: it was ruled out without simulation (too little memory, say).

    `reason` is why it lost, in a few words; empty for the chosen one.
    """

    description: str  # e.g. "2 x prefill tp2 + 3 x decode tp1 on H100"
    layout: Layout
    num_devices: int
    goodput: float | None = None
    goodput_ci: Interval | None = None  # 95 %
    cost_per_hour: float | None = None  # USD
    chosen: bool = False
    reason: str = ""

    @property
    def goodput_per_device(self) -> float | None:
        return None if self.goodput is None else self.goodput / self.num_devices


@dataclass(frozen=True, slots=True)
class AttainmentPoint:
    """Shares of a class's requests at one rate: those that meet both targets (with its 95 % interval), and each."""

    rate: float
    both: float
    both_ci: Interval
    ttft: float
    tpot: float


@dataclass(frozen=True, slots=True)
class AttainmentCurve:
    """The chosen plan, judged at rising rates; `points` ascend in rate. `knee_rate` is the highest rate at which this
    class still keeps its attainment, None if it does so at no rate."""

    slo: SloClass
    points: tuple[AttainmentPoint, ...]
    knee_rate: float | None = None


@dataclass(frozen=True, slots=True)
class LatencySample:
    """Latencies of one class at the rate that the plan was judged at, warm-up left out. In any order; some thousand
    are enough. Requests without a first token, or with one token only, are absent from a list."""

    slo: SloClass
    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PhaseBound:
    """What the instances of one role did with their time, at the rate that the plan was judged at, all together."""

    role: str  # prefill, decode or colocated
    label: str  # e.g. "prefill, 2 x H100 tp2"
    cost_terms_s: tuple[tuple[str, float], ...]  # seconds in steps by cause, names of StepCost.terms
    utilisation: float  # share of time in which a step ran
    kv_peak: float  # largest share of the KV pool in use
    tokens_per_step: float  # mean; prompt tokens for prefill, sequences for decode

    @property
    def bound(self) -> str:
        """The largest term's name, without its unit; 'nothing' when there were no steps."""
        name, time_s = max(self.cost_terms_s, key=lambda term: term[1], default=("nothing", 0.0))
        return name.removesuffix("_s") if time_s > 0 else "nothing"


@dataclass(frozen=True, slots=True)
class SensitivityPoint:
    """The chosen plan under a changed question: `axis` times `factor`, all else as asked.

    `goodput` of the same plan there; `attainment` at the plan's rate, of the class that has least to spare.
    """

    axis: Literal["rate", "prompt_tokens", "output_tokens", "ttft_target", "tpot_target"]
    factor: float
    goodput: float | None = None
    attainment: float | None = None


@dataclass(frozen=True, slots=True)
class ErrorBudget:
    """By how much the plan may be wrong.

    `model_error` is relative, of a step's time, NaN where nobody measured it. `goodput_if_slower` and `_faster`: every
    step's time times 1 + and 1 - that error. `transient_goodput` is what the first few hundred requests from an empty
    start would have claimed.
    """

    model_error: float
    goodput_if_slower: float | None = None
    goodput_if_faster: float | None = None
    transient_goodput: float | None = None
    requests_per_simulation: int = 0
    warm_up_requests: int = 0
    simulations: int = 0
    notes: tuple[str, ...] = ()  # sentences: what was not modelled, or taken from a catalogue

    @property
    def model_error_is_known(self) -> bool:
        return not math.isnan(self.model_error)


@dataclass(frozen=True, slots=True)
class WorkloadSummary:
    """The requests that the plan was judged on. Samples of lengths, some thousand at most, in any order."""

    source: str  # e.g. "data set sharegpt, Poisson arrivals"
    num_requests: int
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]  # the first one included
    arrival_cv: float = 1.0  # coefficient of variation of the times between arrivals
    shared_prefix_share: float = 0.0  # of all prompt tokens


@dataclass(frozen=True, slots=True)
class NodeSummary:
    """One machine. Its devices are called name:0, name:1, ..., as in `PlanGroup.devices`."""

    name: str
    device: str
    num_devices: int


@dataclass(frozen=True, slots=True)
class Reproduction:
    """What to run to get the same answer."""

    slo_text: str  # the SLO file as read, overrides applied
    version: str
    seed: int
    cost_source: str  # e.g. "roofline", "calibration laptop.yaml", "DistServe's published coefficients"
    command: str = ""


@dataclass(frozen=True, slots=True)
class PlanEvidence:
    """`candidates` in falling goodput per device, ruled-out ones last. `nearest`: for an infeasible question, a
    sentence with the targets that the best candidate does reach."""

    candidates: tuple[Candidate, ...]
    curves: tuple[AttainmentCurve, ...]  # one per class
    latencies: tuple[LatencySample, ...]  # one per class
    bounds: tuple[PhaseBound, ...]
    sensitivity: tuple[SensitivityPoint, ...]
    error: ErrorBudget
    workload: WorkloadSummary
    nodes: tuple[NodeSummary, ...]
    reproduction: Reproduction
    nearest: str = ""


@dataclass(frozen=True, slots=True)
class Planned:
    """The planner's answer, and why."""

    plan: Plan
    evidence: PlanEvidence


@dataclass(frozen=True, slots=True)
class RunDescription:
    """What a page says of a run beside its numbers. `inputs` are (name, text) of the files it was made from."""

    title: str  # e.g. "Simulation of plan.yaml"
    workload: str  # e.g. "data set sharegpt, Poisson arrivals, 12 req/s"
    version: str
    command: str = ""
    seed: int | None = None
    inputs: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()  # sentences: what to keep in mind with these numbers
