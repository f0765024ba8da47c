"""A plan with evidence and a run, for tests of reports and serving."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tandem.core.plan import Expected, ExpectedClass, Plan, PlanGroup, Quantiles
from tandem.core.slo import SloClass
from tandem.core.timeline import Stage
from tandem.placement.evidence import (
    Advice,
    AttainmentPoint,
    Change,
    ClassAttainment,
    ErrorBudget,
    LatencySample,
    LayoutComparison,
    NodeSummary,
    PhaseBound,
    PlanCandidate,
    PlanEvidence,
    Planned,
    Reproduction,
    SensitivityPoint,
    WorkloadSummary,
)
from tandem.placement.simulator.result import STAGES, InstanceUse, SimulationResult
from tandem.placement.workload.requests import RequestStream

CHAT = SloClass(name="chat", ttft_s=0.4, tpot_s=0.04)
BATCH = SloClass(name="batch", ttft_s=4.0, tpot_s=0.1, attainment=0.95, share=0.3)
GROUPS = (
    PlanGroup(role="prefill", instances=2, device="H100", tp=2, devices=(("0:0", "0:1"), ("1:0", "1:1")), kv_tokens=1),
    PlanGroup(role="decode", instances=1, device="H100", devices=(("0:2",),), kv_tokens=200_000),
)
Verdict = Literal["disaggregate", "colocate", "mixed", "infeasible"]


def planned(verdict: Verdict = "disaggregate", classes: Sequence[SloClass] = (CHAT,), **evidence: Any) -> Planned:
    """Goodput 11.2 requests per second on 5 devices, evaluated at 10; `evidence` replaces parts of it."""
    plan = Plan(
        model="Llama-3.1-70B",
        verdict=verdict,
        summary="Two prefill instances feed one decode instance.",
        groups=GROUPS,
        expected=Expected(
            rate=10.0,
            goodput=11.2,
            goodput_ci=(10.6, 11.7),
            goodput_per_device=2.24,
            cost_per_hour=21.5,
            classes=tuple(_expected(slo) for slo in classes),
            bounds={"prefill": "linear", "decode": "kv_read"},
        ),
    )
    parts: dict[str, Any] = {
        "candidates": (
            PlanCandidate(
                "2 x prefill tp2 + 1 x decode tp1", "disaggregated", 5, 11.2, (10.6, 11.7), 21.5, chosen=True
            ),
            PlanCandidate(
                "3 x colocated tp1", "colocated", 3, 5.1, (4.9, 5.3), 12.9, reason="TTFT is 1.4 x its target"
            ),
            PlanCandidate(
                "1 x decode tp1pp2 + 1 x prefill tp1", "mixed", 3, 4.2, None, None, reason="KV memory is full"
            ),
            PlanCandidate("1 x colocated tp1", "colocated", 1, reason="the weights alone do not fit"),
        ),
        "attainments": tuple(_curve(slo) for slo in classes),
        "latencies": tuple(_latencies(slo) for slo in classes),
        "bounds": (
            PhaseBound("prefill", "prefill, 2 x H100 tp2", (("linear_s", 6.0), ("attention_s", 1.0)), 0.71, 0.2, 1800),
            PhaseBound("decode", "decode, 1 x H100", (("linear_s", 3.0), ("kv_read_s", 4.5)), 0.93, 0.8, 38.0),
        ),
        "sensitivity": (
            SensitivityPoint("rate", 1.25, None, 0.7),
            SensitivityPoint("prompt_tokens", 0.5, 15.0, 1.0),
            SensitivityPoint("prompt_tokens", 2.0, 6.0, 0.4),
        ),
        "error": ErrorBudget(0.08, 10.2, 12.1, 14.8, 2000, 400, 212, ("Links are the vendor's figures.",)),
        "workload": WorkloadSummary("data set sharegpt, Poisson arrivals", 2000, (10, 200, 3000), (5, 50, 70)),
        "nodes": (NodeSummary("0", "H100", 4), NodeSummary("1", "H100", 2)),
        "reproduction": Reproduction("model: Llama-3.1-70B\n", "0.1.0", 7, "roofline", "tandem plan slo.yaml"),
        "advice": Advice(
            (
                Change("TPOT targets 20 % looser (48.0 ms)", 13.0, 5, 21.5, (12.7, 13.6)),
                Change("one more decode instance (1 H100 device)", 13.2, 6, 25.8),
                Change("L4 instead", 1.1, 5, 4.0),
            ),
            LayoutComparison(
                True,
                "2 x prefill tp2 + 1 x decode tp1",
                "3 x colocated tp1",
                0.758,
                (("prompt_tokens", 0.75, 1.1),),
                (0.7, 0.8),
                3,
            ),
        ),
        "nearest": "the best plan reaches 90 % at TTFT 0.9 s" if verdict == "infeasible" else "",
    }
    return Planned(plan, PlanEvidence(**(parts | evidence)))


def plan_of(model: Path, groups: Sequence[PlanGroup]) -> Plan:
    return Plan(model=str(model), verdict="disaggregate", groups=tuple(groups))


def finished_run(count: int = 400, *, inside: bool = True) -> SimulationResult:
    """10 requests per second that take 0.2 s to the first token and 0.03 s for each of 10 more. `inside`: with the
    stages that only the server sees, and with an instance."""
    random = np.random.default_rng(0)
    arrival_s = np.cumsum(random.exponential(0.1, count))
    lengths = np.full(count, 11)
    stamps = np.full((count, len(STAGES)), math.nan)
    after_s = {Stage.RECEIVED: 0.0, Stage.FIRST_TOKEN: 0.2, Stage.FINISHED: 0.5}
    if inside:
        after_s |= {Stage.ADMITTED: 0.001, Stage.PREFILL_QUEUED: 0.002, Stage.PREFILL_STARTED: 0.1}
        after_s |= {Stage.TRANSFER_COMMITTED: 0.21, Stage.DECODE_ADMITTED: 0.22, Stage.SECOND_TOKEN: 0.25}
    for stage, offset_s in after_s.items():
        stamps[:, STAGES.index(stage)] = arrival_s + offset_s
    use = InstanceUse("prefill-0", "prefill", 50, 20.0, 40_000, 0, 100, 0, 70, 100, {"linear_s": 15.0, "head_s": 5.0})
    return SimulationResult(
        requests=RequestStream.make(arrival_s, random.integers(1, 300, count), lengths),
        stamps=stamps,
        num_attempts=np.ones(count, dtype=np.int64),
        num_cached_tokens=np.zeros(count, dtype=np.int64),
        end_s=float(arrival_s[-1]) + 0.5,
        instances=(use,) if inside else (),
    )


def _expected(slo: SloClass) -> ExpectedClass:
    ttft_s = Quantiles(mean=0.21, p50=0.197, p90=0.354, p99=0.552)
    tpot_s = Quantiles(mean=0.028, p50=0.0279, p90=0.0342, p99=0.0394)
    return ExpectedClass(slo=slo, attainment=0.921, attainment_ci=(0.905, 0.936), ttft_s=ttft_s, tpot_s=tpot_s)


def _curve(slo: SloClass) -> ClassAttainment:
    shares = {4.0: 1.0, 8.0: 0.99, 12.0: 0.8, 16.0: 0.1}
    points = (AttainmentPoint(rate, s, (max(0.0, s - 0.02), min(1.0, s + 0.02)), s, 1.0) for rate, s in shares.items())
    return ClassAttainment(slo, tuple(points), knee_rate=10.9)


def _latencies(slo: SloClass) -> LatencySample:
    random = np.random.default_rng(0)
    ttft_s = random.lognormal(math.log(slo.ttft_s / 2), 0.4, 500)
    tpot_s = random.normal(0.7 * slo.tpot_s, 0.1 * slo.tpot_s, 500)
    return LatencySample(slo, tuple(ttft_s.tolist()), tuple(tpot_s.tolist()))
