"""The evidence for a plan: all values that the report shows.

The planner fills these values, the report only shows them. Units: seconds, requests per second, tokens, shares of 1.
Rates and goodput are of the whole plan unless the name says per device.
"""

import math
from dataclasses import dataclass
from typing import Literal

from tandem.core.plan import Plan
from tandem.core.slo import SloClass
from tandem.core.slo_file import Layout

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class PlanCandidate:
    """An evaluated configuration. `goodput` is None without simulation (e.g. too little memory). `reason`: why the
    configuration was rejected; empty for the chosen one."""

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
    """Shares of a class's requests at one rate that meet both targets (with its 95 % interval), TTFT, and TPOT."""

    rate: float
    both: float
    both_ci: Interval
    ttft: float
    tpot: float


@dataclass(frozen=True, slots=True)
class ClassAttainment:
    """Attainment of one class against rate; `points` ascend in rate. `knee_rate` is the highest simulated rate with the
    required attainment, None if there is none."""

    slo: SloClass
    points: tuple[AttainmentPoint, ...]
    knee_rate: float | None = None


@dataclass(frozen=True, slots=True)
class LatencySample:
    """Latencies of one class at the plan's rate in steady state, a few thousand in any order. Requests without a first
    token have no TTFT, requests with one token no TPOT."""

    slo: SloClass
    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PhaseBound:
    """The step time of a group or role by cause, at the plan's rate, summed over its instances."""

    role: str  # prefill, decode or colocated
    label: str  # e.g. "prefill, 2 x H100 tp2"
    cost_terms_s: tuple[tuple[str, float], ...]  # seconds by name of StepCost.terms
    utilisation: float  # share of time with a step in progress
    kv_peak: float  # largest share of the KV pool in use
    tokens_per_step: float  # mean; prompt tokens for prefill, sequences for decode

    @property
    def bound(self) -> str:
        """The name of the largest term without its unit; 'nothing' without steps."""
        name, time_s = max(self.cost_terms_s, key=lambda term: term[1], default=("nothing", 0.0))
        return name.removesuffix("_s") if time_s > 0 else "nothing"


@dataclass(frozen=True, slots=True)
class SensitivityPoint:
    """The plan for a changed SLO file: `axis` times `factor`.

    `goodput` of the plan; `attainment` at the plan's rate, of the class with the smallest margin.
    """

    axis: Literal["rate", "prompt_tokens", "output_tokens", "ttft_target", "tpot_target"]
    factor: float
    goodput: float | None = None
    attainment: float | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """One change of the plan or of its SLO file, and the goodput of the changed plan. `cost_per_hour` in USD.
    `interval`: 95 % interval of the goodput, from simulations of the same requests with and without the change; None if
    the goodput is predicted."""

    description: str  # e.g. "one more decode instance (2 devices)"
    goodput: float
    num_devices: int
    cost_per_hour: float | None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class LayoutComparison:
    """The chosen configuration against the best of the other layout, `rival`; one of them is disaggregated and the
    other colocated. `ratio`: goodput per device of the rival divided by that of the chosen one, and as predicted with
    one parameter changed, (axis, factor, ratio). `interval`: 95 % interval of the ratio, from simulations of the same
    requests; None if it is predicted. Of the other layout the `num_compared` most promising configurations were."""

    is_disaggregated: bool
    chosen: str
    rival: str
    ratio: float
    changed: tuple[tuple[str, float, float], ...] = ()
    interval: tuple[float, float] | None = None
    num_compared: int = 1


@dataclass(frozen=True, slots=True)
class Advice:
    """`changes`, the most helpful first: by goodput per USD, or per device without prices. The simulated ones come
    before those that are only predicted. `layouts` is None if only one of the layouts was compared."""

    changes: tuple[Change, ...]
    layouts: LayoutComparison | None


@dataclass(frozen=True, slots=True)
class ErrorBudget:
    """The error of the prediction.

    `model_error` is the relative error of step times, NaN if unknown. `goodput_if_slower` and `_faster`: with all step
    times multiplied by 1 + and 1 - `model_error`. `transient_goodput`: of the first few hundred requests from an empty
    start.
    """

    model_error: float
    goodput_if_slower: float | None = None
    goodput_if_faster: float | None = None
    transient_goodput: float | None = None
    requests_per_simulation: int = 0
    warm_up_requests: int = 0
    simulations: int = 0
    notes: tuple[str, ...] = ()  # sentences about limits of the prediction

    @property
    def model_error_is_known(self) -> bool:
        return not math.isnan(self.model_error)


@dataclass(frozen=True, slots=True)
class WorkloadSummary:
    """The requests of the simulations. Samples of lengths, at most a few thousand, in any order. Of a trace:
    `simulated_share` of its requests, `cover` as in the SLO file, and `notes`, sentences about requests that are left
    out."""

    source: str  # e.g. "data set sharegpt, Poisson arrivals"
    num_requests: int
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]  # the first token included
    arrival_cv: float = 1.0  # coefficient of variation of the times between arrivals
    shared_prefix_share: float = 0.0  # of all prompt tokens
    simulated_share: float = 1.0
    cover: float = 1.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeSummary:
    """One machine. Its devices have the names name:0, name:1, ..., as in `PlanGroup.devices`."""

    name: str
    device: str
    num_devices: int


@dataclass(frozen=True, slots=True)
class Reproduction:
    """The input for the same plan."""

    slo_text: str  # the SLO file with overrides applied
    version: str
    seed: int
    cost_source: str  # e.g. "roofline", "calibration laptop.yaml", "DistServe's published coefficients"
    command: str = ""


@dataclass(frozen=True, slots=True)
class PlanEvidence:
    """`candidates` in falling goodput per device, without simulation last. `nearest`: for an infeasible SLO file, a
    sentence with the nearest feasible targets. `advice` is None if it was not asked for."""

    candidates: tuple[PlanCandidate, ...]
    attainments: tuple[ClassAttainment, ...]  # one per class
    latencies: tuple[LatencySample, ...]  # one per class
    bounds: tuple[PhaseBound, ...]
    sensitivity: tuple[SensitivityPoint, ...]
    error: ErrorBudget
    workload: WorkloadSummary
    nodes: tuple[NodeSummary, ...]
    reproduction: Reproduction
    nearest: str = ""
    advice: Advice | None = None


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan with its evidence."""

    plan: Plan
    evidence: PlanEvidence


@dataclass(frozen=True, slots=True)
class RunDescription:
    """The texts of a run's report. `inputs` are (name, text) of the run's input files."""

    title: str  # e.g. "Simulation of plan.yaml"
    workload: str  # e.g. "data set sharegpt, Poisson arrivals, 12 req/s"
    version: str
    command: str = ""
    seed: int | None = None
    inputs: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()  # sentences about the validity of the numbers
