"""The plan of the deployment that the search found, and its evidence.

A deployment of many instances is simulated as a smaller one of its proportions. Its figures are scaled by the ratio of
the predictions for both deployments; the notes of the error budget report the scaling.
"""

import importlib.metadata
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from tandem.core.config_file import dump_config
from tandem.core.plan import Alternative, Expected, Plan
from tandem.core.slo_file import SloFile
from tandem.placement.evaluation.attainment import deciding_window, expected_windows
from tandem.placement.evaluation.goodput import find_goodput
from tandem.placement.evidence import (
    ErrorBudget,
    NodeSummary,
    PlanCandidate,
    PlanEvidence,
    Planned,
    Reproduction,
    WorkloadSummary,
)
from tandem.placement.rank_notes import rank_notes
from tandem.placement.search.advice import advise
from tandem.placement.search.best_first import ReportProgress
from tandem.placement.search.candidate import CandidateDeployment
from tandem.placement.search.candidate_list import bottleneck, list_candidates, rejected_shapes
from tandem.placement.search.chosen_deployment import (
    MeasuredGoodput,
    Observation,
    class_attainments,
    measure_and_observe,
)
from tandem.placement.search.final_comparison import FinalComparison
from tandem.placement.search.mapper import Mapper
from tandem.placement.search.problem import Problem
from tandem.placement.search.sensitivity import predicted_goodput, sensitivity_of
from tandem.placement.search.space import SearchSpace
from tandem.placement.search.trial import evaluate_at, plan_of, simulate_requests
from tandem.placement.workload.description import describe, summary_of

_ALTERNATIVES = 8
_VARIED_REQUESTS = 1000  # of a window, at most, for what is only shown beside the plan
_TRANSIENT_REQUESTS = 300  # as in DistServe's simulator


def explain(
    slo_file: SloFile,
    space: SearchSpace,
    comparison: FinalComparison,
    num_simulations: int,
    mapper: Mapper,
    report: ReportProgress,
    *,
    met: bool,
    with_advice: bool,
) -> Planned:
    """The plan of the chosen deployment with its evidence. `met`: `space` belongs to the problem of the SLO file;
    otherwise to the nearest feasible problem."""
    problem, deployment = comparison.problem, comparison.chosen.candidate.deployment
    simulated, is_scaled, scale = comparison.chosen.simulated, comparison.chosen.is_scaled, comparison.chosen.scale
    goodput = comparison.goodput
    met = met and (
        problem.rate is None
        or goodput >= problem.rate
        or evaluate_at(problem, simulated, is_scaled, problem.rate / scale).meets
    )
    rate = problem.rate if problem.rate is not None and met else goodput
    report(0.0, "simulating the chosen deployment at several rates")
    measured, observation = measure_and_observe(
        problem,
        simulated,
        comparison.rate,
        rate / scale if rate != goodput else comparison.rate,
        mapper,
        separate_nodes=is_scaled,
        known=comparison.evaluated,
    )
    report(0.6, "simulating other lengths and targets")
    deciding = deciding_window(problem.windows, observation.evaluation) if problem.windows else None
    varied = space.problem if deciding is None else problem.of_window(deciding).with_requests(_VARIED_REQUESTS)
    points = sensitivity_of(varied, measured, rate / scale, mapper, separate_nodes=is_scaled)
    advice = None
    if with_advice:
        report(0.8, "simulating changes that would help")
        smaller = varied.with_requests(_VARIED_REQUESTS)
        advice = advise(slo_file, space, smaller, comparison, points, measured.goodput, mapper)
    interval = measured.goodput_ci[0] * scale, measured.goodput_ci[1] * scale
    candidates = _with_interval(list_candidates(space, comparison), interval)
    expected = Expected(
        rate=rate,
        requests=observation.requests,
        goodput=goodput,
        goodput_ci=interval,
        goodput_per_device=goodput / deployment.num_devices,
        cost_per_hour=problem.cluster.price_per_hour(deployment.devices),
        classes=tuple(of_class.expected() for of_class in observation.evaluation.classes),
        cached_share=observation.cached_share if (problem.requests.prefix_group >= 0).any() else None,
        windows=expected_windows(problem.windows, observation.evaluation),
        bounds={bound.role: bound.bound for bound in observation.bounds},
    )
    nearest = "" if met else _nearest(slo_file, problem, goodput)
    plan = plan_of(problem, deployment).model_copy(
        update={
            "model": slo_file.model,
            "precision": slo_file.precision,
            "slo": slo_file.slo,
            "summary": nearest or _summary(space, deployment, goodput),
            "expected": expected,
            "alternatives": _alternatives(candidates),
            "notes": rank_notes(space, deployment),
            **({} if met else {"verdict": "infeasible"}),
        }
    )
    return Planned(
        plan,
        PlanEvidence(
            candidates=candidates,
            attainments=tuple(
                replace(
                    attainment,
                    points=tuple(replace(point, rate=point.rate * scale) for point in attainment.points),
                    knee_rate=None if attainment.knee_rate is None else attainment.knee_rate * scale,
                )
                for attainment in class_attainments(measured, problem.classes)
            ),
            latencies=observation.latencies,
            bounds=observation.bounds,
            sensitivity=tuple(
                replace(point, goodput=None if point.goodput is None else point.goodput * scale) for point in points
            ),
            error=_error(
                space,
                measured,
                observation,
                deployment,
                scale,
                num_simulations + comparison.num_simulations,
                mapper,
            ),
            workload=_workload(slo_file, problem, observation.requests),
            nodes=_nodes(problem),
            reproduction=_reproduction(slo_file, problem),
            nearest=nearest,
            advice=advice,
        ),
    )


def explain_infeasible(slo_file: SloFile, space: SearchSpace) -> Planned:
    """An infeasible plan without groups: the model does not fit, or its step times are unknown."""
    problem = space.problem
    candidates = rejected_shapes(space.kinds, space.limits)
    if space.kinds.prefill or space.kinds.colocated:
        nearest = f"no deployment of {slo_file.model} meets its targets, nor several times as much, at any rate"
    else:
        reason = candidates[0].reason if candidates else "no parallel shape divides its heads and layers"
        nearest = f"no instance of {slo_file.model} fits this cluster: {reason}"
    plan = Plan(
        model=slo_file.model,
        precision=slo_file.precision,
        verdict="infeasible",
        summary=f"{nearest}.",
        groups=(),
        notes=rank_notes(space, None),
    )
    return Planned(
        plan,
        PlanEvidence(
            candidates=candidates,
            attainments=(),
            latencies=(),
            bounds=(),
            sensitivity=(),
            error=ErrorBudget(model_error=problem.source.error),
            workload=_workload(slo_file, problem, problem.section.requests),
            nodes=_nodes(problem),
            reproduction=_reproduction(slo_file, problem),
            nearest=nearest,
        ),
    )


def _summary(space: SearchSpace, deployment: CandidateDeployment, goodput: float) -> str:
    price = space.problem.cluster.price_per_hour(deployment.devices)
    cost = "" if price is None or goodput == 0 else f", {price / (goodput * 3.6):.3g} USD per thousand requests"
    return (
        f"{deployment} serve {goodput:.3g} requests per second within the targets on {deployment.num_devices} devices"
        f"{cost}; the bottleneck is {bottleneck(space, deployment)}."
    )


def _nearest(slo_file: SloFile, problem: Problem, goodput: float) -> str:
    if problem.classes != slo_file.slo:
        targets = "; ".join(f"{slo.name}: TTFT {slo.ttft_s:.3g} s, TPOT {slo.tpot_s:.3g} s" for slo in problem.classes)
        return (
            f"this SLO can't be met; the nearest feasible targets are {targets}, at {goodput:.3g} requests per second"
        )
    return (
        f"this SLO can't be met at {problem.rate:g} requests per second; this cluster meets it up to {goodput:.3g} "
        "requests per second"
    )


def _alternatives(candidates: Sequence[PlanCandidate]) -> tuple[Alternative, ...]:
    rejected = [candidate for candidate in candidates if not candidate.chosen][:_ALTERNATIVES]
    return tuple(
        Alternative(
            description=candidate.description,
            num_devices=candidate.num_devices,
            goodput_per_device=candidate.goodput_per_device,
            reason=candidate.reason,
        )
        for candidate in rejected
    )


def _with_interval(candidates: Sequence[PlanCandidate], interval: tuple[float, float]) -> tuple[PlanCandidate, ...]:
    return tuple(replace(candidate, goodput_ci=interval) if candidate.chosen else candidate for candidate in candidates)


def _error(
    space: SearchSpace,
    measured: MeasuredGoodput,
    observation: Observation,
    deployment: CandidateDeployment,
    scale: float,
    simulations: int,
    mapper: Mapper,
) -> ErrorBudget:
    problem, error = space.problem, space.problem.source.error
    slower = faster = None
    if not math.isnan(error):
        slowdowns = [1.0, 1 + error, max(0.1, 1 - error)]
        predicted, *changed = mapper(partial(predicted_goodput, problem, measured.deployment), slowdowns)
        if predicted > 0:
            slower, faster = (measured.goodput * scale * each / predicted for each in changed)
    notes = ["The sensitivity of the goodput, also to the model error, comes from predictions, not from simulations."]
    notes += _unmeasured(problem, deployment)
    if measured.deployment != deployment:
        notes.append(
            f"The figures come from a simulation of {measured.deployment}, which has the plan's proportions, and are "
            f"scaled by {scale:.3g}, the ratio of the predictions; the complete deployment was not simulated."
        )
    return ErrorBudget(
        model_error=error,
        goodput_if_slower=slower,
        goodput_if_faster=faster,
        transient_goodput=None if problem.windows else _transient_goodput(problem, measured) * scale,
        requests_per_simulation=observation.requests,
        warm_up_requests=observation.evaluation.warm_up,
        simulations=simulations,
        notes=tuple(notes),
    )


def _transient_goodput(problem: Problem, measured: MeasuredGoodput) -> float:
    """The goodput of a few hundred requests from an empty start."""
    if measured.goodput == 0:
        return 0.0
    return find_goodput(
        partial(simulate_requests, problem, measured.deployment),
        problem.requests.head(_TRANSIENT_REQUESTS),
        problem.classes,
        guess=measured.goodput,
        tolerance=0.1,
        transient=True,
    )


def _unmeasured(problem: Problem, deployment: CandidateDeployment) -> list[str]:
    """What the plan depends on and no published table has."""
    model, notes = problem.model, []
    if problem.kv_codec != "none" and deployment.sends_kv:
        notes.append(
            f"KV between nodes is sent in {problem.kv_codec}, and tokens may be others of nearly equal probability; "
            "the time of coding is not counted."
        )
    if model.weight_bytes == 0.5:
        notes.append("Products with int4 weights count as products in bf16 that read a quarter of the weights' bytes.")
    used = {group.kind.device for group in deployment.groups}
    without = sorted(name for name in used if not problem.cluster.devices[name].fp8_flops)
    if model.weight_bytes == 1.0 and without:
        notes.append(f"{', '.join(without)} multiply fp8 weights in bf16, as if their conversion took no time.")
    if any(group.kind.shape.dp > 1 for group in deployment.groups):
        notes.append(
            "Ranks that share experts are taken to be equally loaded; the exchange of their tokens counts as an "
            "all-reduce."
        )
    return notes


def _workload(slo_file: SloFile, problem: Problem, count: int) -> WorkloadSummary:
    summary = summary_of(problem.requests.head(count), describe(slo_file.workload))
    return replace(summary, simulated_share=problem.simulated_share, cover=problem.cover, notes=problem.notes)


def _nodes(problem: Problem) -> tuple[NodeSummary, ...]:
    return tuple(NodeSummary(node.name, node.device.name, node.num_devices) for node in problem.cluster.nodes)


def _reproduction(slo_file: SloFile, problem: Problem) -> Reproduction:
    source = type(problem.source).__name__.removesuffix("Source").lower()
    return Reproduction(
        slo_text=dump_config(slo_file),
        version=importlib.metadata.version("tandem-serve"),
        seed=problem.section.seed,
        cost_source=source,
    )
