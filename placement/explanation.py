"""The plan of the fleet that a search found, and the evidence for it.

A fleet of more than some instances is simulated as a smaller one of its proportions, and its figures are scaled by what
each phase alone promises of the two; the notes of the error budget say so.
"""

import importlib.metadata
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from tandem.core.config_file import dump_config
from tandem.core.plan import Alternative, Expected, Plan
from tandem.core.slo_file import SloFile
from tandem.placement.evidence import (
    Candidate,
    ErrorBudget,
    NodeSummary,
    PlanEvidence,
    Planned,
    Reproduction,
)
from tandem.placement.judging.goodput import goodput_at
from tandem.placement.search import words
from tandem.placement.search.best_first import Found, Looked, Report
from tandem.placement.search.fleet import Fleet
from tandem.placement.search.parallel import Mapper
from tandem.placement.search.problem import Problem
from tandem.placement.search.runners_up import with_runners_up
from tandem.placement.search.sensitivity import predicted, sensitivity_of
from tandem.placement.search.space import Space
from tandem.placement.search.trial import plan_of, simulated, trial_of
from tandem.placement.search.verdict import Observation, Verdict, curves_of, observe, verdict_on
from tandem.placement.workload.description import describe, summary_of

_WHOLE_FLEET = 16  # instances up to which the final figures come from the fleet itself
_ALTERNATIVES = 8
_TRANSIENT_REQUESTS = 300  # as DistServe's simulator has them


def explained(
    slo_file: SloFile, space: Space, found: Found, looked: Looked, mapper: Mapper, report: Report, *, met: bool
) -> Planned:
    """The plan with all that is to be said for it. `met`: it answers what was asked, `space` being of that question;
    else of the nearest one that has an answer."""
    problem, fleet = space.problem, looked.fleet
    tried = fleet if fleet.num_instances <= _WHOLE_FLEET else trial_of(fleet)
    apart = tried != fleet
    scale = looked.predicted / space.predictor.goodput(tried) if apart else 1.0
    report(0.0, "the chosen fleet, over rates")
    verdict = verdict_on(problem, tried, (looked.goodput or looked.predicted) / scale, mapper, apart=apart)
    goodput = verdict.goodput * scale
    most = max(goodput, looked.goodput or 0.0)
    met = met and (problem.rate is None or most >= problem.rate)
    rate = problem.rate if problem.rate is not None and met else goodput
    report(0.4, "the chosen fleet, at its rate")
    seen = observe(problem, tried, apart, rate / scale)
    report(0.5, "the runners-up")
    others = with_runners_up(space, found.looked, fleet, mapper)
    report(0.7, "other lengths and targets")
    points = sensitivity_of(problem, verdict, rate / scale, mapper, apart=apart)
    interval = verdict.goodput_ci[0] * scale, verdict.goodput_ci[1] * scale
    listed = _with_interval(words.candidates(space, looked, goodput, others), interval)
    expected = Expected(
        rate=rate,
        goodput=goodput,
        goodput_ci=interval,
        goodput_per_device=goodput / fleet.num_devices,
        cost_per_hour=problem.cluster.price_per_hour(fleet.devices),
        classes=tuple(judged.expected() for judged in seen.judgement.classes),
        bounds={bound.role: bound.bound for bound in seen.bounds},
    )
    nearest = "" if met else _nearest(slo_file, problem, goodput)
    plan = plan_of(problem, fleet).model_copy(
        update={
            "model": slo_file.model,
            "summary": nearest or _summary(space, fleet, goodput),
            "expected": expected,
            "alternatives": _alternatives(listed),
            **({} if met else {"verdict": "infeasible"}),
        }
    )
    return Planned(
        plan,
        PlanEvidence(
            candidates=listed,
            curves=tuple(
                replace(
                    curve,
                    points=tuple(replace(point, rate=point.rate * scale) for point in curve.points),
                    knee_rate=None if curve.knee_rate is None else curve.knee_rate * scale,
                )
                for curve in curves_of(verdict, problem.classes)
            ),
            latencies=seen.latencies,
            bounds=seen.bounds,
            sensitivity=tuple(
                replace(point, goodput=None if point.goodput is None else point.goodput * scale) for point in points
            ),
            error=_error(space, verdict, seen, fleet, scale, found.num_simulations),
            workload=summary_of(problem.requests.head(seen.requests), describe(slo_file.workload)),
            nodes=_nodes(problem),
            reproduction=_reproduction(slo_file, problem),
            nearest=nearest,
        ),
    )


def unanswered(slo_file: SloFile, space: Space) -> Planned:
    """No fleet was found for any targets: the model does not fit, or nothing is known of its speed."""
    problem = space.problem
    listed = words.ruled_out(space.kinds, space.limits)
    why = listed[0].reason if listed else "no parallel shape suits its heads and layers"
    nearest = f"no instance of {slo_file.model} fits this cluster: {why}"
    plan = Plan(model=slo_file.model, verdict="infeasible", summary=f"{nearest}.", groups=())
    return Planned(
        plan,
        PlanEvidence(
            candidates=listed,
            curves=(),
            latencies=(),
            bounds=(),
            sensitivity=(),
            error=ErrorBudget(model_error=problem.source.error),
            workload=summary_of(problem.requests.head(problem.section.requests), describe(slo_file.workload)),
            nodes=_nodes(problem),
            reproduction=_reproduction(slo_file, problem),
            nearest=nearest,
        ),
    )


def _summary(space: Space, fleet: Fleet, goodput: float) -> str:
    price = space.problem.cluster.price_per_hour(fleet.devices)
    cost = "" if price is None or goodput == 0 else f", {price / (goodput * 3.6):.3g} USD per thousand requests"
    return (
        f"{fleet} serve {goodput:.3g} requests per second within the targets on {fleet.num_devices} devices"
        f"{cost}; the bottleneck is {words.bottleneck(space, fleet)}."
    )


def _nearest(slo_file: SloFile, problem: Problem, goodput: float) -> str:
    if problem.classes != slo_file.slo:
        targets = "; ".join(f"{slo.name}: TTFT {slo.ttft_s:.3g} s, TPOT {slo.tpot_s:.3g} s" for slo in problem.classes)
        return f"this SLO can't be met; the nearest that can is {targets}, at {goodput:.3g} requests per second"
    return (
        f"this SLO can't be met at {problem.rate:g} requests per second; this cluster keeps it up to {goodput:.3g} "
        "requests per second"
    )


def _alternatives(listed: Sequence[Candidate]) -> tuple[Alternative, ...]:
    rejected = [one for one in listed if not one.chosen][:_ALTERNATIVES]
    return tuple(
        Alternative(
            description=one.description,
            num_devices=one.num_devices,
            goodput_per_device=one.goodput_per_device,
            reason=one.reason,
        )
        for one in rejected
    )


def _with_interval(listed: Sequence[Candidate], interval: tuple[float, float]) -> tuple[Candidate, ...]:
    return tuple(replace(one, goodput_ci=interval) if one.chosen else one for one in listed)


def _error(
    space: Space, verdict: Verdict, seen: Observation, fleet: Fleet, scale: float, simulations: int
) -> ErrorBudget:
    problem, error = space.problem, space.problem.source.error
    slower = faster = None
    if not math.isnan(error):
        asked = predicted(problem, verdict.fleet)
        if asked > 0:
            goodput = verdict.goodput * scale / asked
            slower = goodput * predicted(problem, verdict.fleet, 1 + error)
            faster = goodput * predicted(problem, verdict.fleet, max(0.1, 1 - error))
    notes = ["Sensitivity of the goodput, and to the model's error, is that of each phase alone, not of a simulation."]
    if verdict.fleet != fleet:
        notes.append(
            f"Figures come from {verdict.fleet}, a fleet of the plan's proportions, and are scaled by {scale:.3g}, as "
            "each phase alone promises; the whole fleet was not simulated."
        )
    return ErrorBudget(
        model_error=error,
        goodput_if_slower=slower,
        goodput_if_faster=faster,
        transient_goodput=_transient(problem, verdict) * scale,
        requests_per_simulation=seen.requests,
        warm_up_requests=seen.judgement.warm_up,
        simulations=simulations,
        notes=tuple(notes),
    )


def _transient(problem: Problem, verdict: Verdict) -> float:
    """What a few hundred requests from an empty start would have claimed."""
    if verdict.goodput == 0:
        return 0.0
    return goodput_at(
        partial(simulated, problem, verdict.fleet),
        problem.requests.head(_TRANSIENT_REQUESTS),
        problem.classes,
        guess=verdict.goodput,
        tolerance=0.1,
        transient=True,
    ).rate


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
