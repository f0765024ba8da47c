"""The HTML report of one run. Simulated and live runs have the same page, so they can be compared."""

from collections.abc import Sequence

import numpy as np

from tandem.core.slo import SloClass
from tandem.placement.evaluation.attainment import Evaluation, evaluate
from tandem.placement.evaluation.phase_bound import phase_bound
from tandem.placement.evidence import LatencySample, PhaseBound, RunDescription
from tandem.placement.report import formatting, latency_figures, plan_figures, run_figures
from tandem.placement.report.page import render
from tandem.placement.simulator.result import SimulationResult
from tandem.placement.workload.description import summary_of

_MAX_SAMPLES = 4000
_MAX_INSTANCES = 24


def simulation_report_html(result: SimulationResult, classes: Sequence[SloClass], description: RunDescription) -> str:
    """The HTML page. The same run gives the same bytes."""
    evaluation = evaluate(result, classes)
    samples = _samples(result, classes, evaluation)
    workload = summary_of(result.requests, description.workload)
    bounds = _bounds(result)
    sections = [("attainment", "Attainment"), ("latency", "Latencies"), ("time", "Over time")]
    sections += [("bounds", "Instances")] if bounds else []
    sections += [("workload", "Workload"), ("reproduction", "Reproduction")]
    badge, headline = _conclusion(result, evaluation)
    return render(
        "run.html",
        title=description.title,
        subject=description.title,
        badge=badge,
        good=evaluation.meets,
        headline=headline,
        summary="",
        figures=_key_figures(result, evaluation),
        sections=sections,
        version=description.version,
        description=description,
        evaluation=evaluation,
        result=result,
        ttft_plot=latency_figures.ttft_cdf(samples),
        tpot_plot=latency_figures.tpot_cdf(samples),
        parts_plot=run_figures.timeline_parts(result),
        time_plots=run_figures.load_over_time(result),
        bounds=bounds,
        bounds_plot=plan_figures.phase_bounds(bounds),
        instances=result.instances[:_MAX_INSTANCES],
        hidden_instances=max(0, len(result.instances) - _MAX_INSTANCES),
        workload=workload,
        workload_plots=latency_figures.workload_histograms(workload),
    )


def _conclusion(result: SimulationResult, evaluation: Evaluation) -> tuple[str, str]:
    """(badge, headline)."""
    classes = [of_class for of_class in evaluation.classes if of_class.requests]
    shares = [f"{formatting.percent(of_class.attainment)} of class {of_class.slo.name}" for of_class in classes]
    met = formatting.join(shares or ["no request"])
    if len(classes) == 1:
        met = f"{formatting.percent(classes[0].attainment)} of the requests"
    text = f"{met[:1].upper()}{met[1:]} met both targets at {formatting.rate(result.requests.rate)}."
    if not evaluation.stable:
        return "Overloaded", f"{text} Queues grow during the run; a longer run would miss more targets."
    if result.num_refused and not evaluation.meets:
        return "Overloaded", f"{text} {result.num_refused:,} requests found no instance in time and were refused."
    return ("Within targets" if evaluation.meets else "Targets missed"), text


def _key_figures(result: SimulationResult, evaluation: Evaluation) -> list[tuple[str, str]]:
    count = len(result.requests)
    tokens = float(result.requests.output_tokens[result.finished].sum())
    figures = [
        (f"of {count:,} requests finished", f"{int(result.finished.sum()):,}"),
        ("output tokens per second", formatting.number(tokens / result.end_s if result.end_s > 0 else None)),
    ]
    for name, values in (("TTFT", result.ttft_s), ("TPOT", result.tpot_s)):
        known = values[~np.isnan(values)]
        if len(known):
            p50, p99 = np.quantile(known, (0.5, 0.99))
            figures.append((f"{name} p50 (p99: {formatting.seconds(p99)})", formatting.seconds(p50)))
    figures.append(("first requests left out as warm-up", formatting.count(evaluation.warm_up)))
    return figures


def _samples(
    result: SimulationResult, classes: Sequence[SloClass], evaluation: Evaluation
) -> tuple[LatencySample, ...]:
    """Latencies of the requests in steady state."""
    position = np.arange(len(result.requests))
    steady = (position >= evaluation.warm_up) & (position < len(position) - evaluation.tail)
    samples = []
    for index, slo in enumerate(classes):
        of_class = steady & (result.requests.slo_class == index)
        samples.append(LatencySample(slo, _thinned(result.ttft_s[of_class]), _thinned(result.tpot_s[of_class])))
    return tuple(samples)


def _thinned(values: np.ndarray) -> tuple[float, ...]:
    known = values[~np.isnan(values)]
    return tuple(known[:: max(1, len(known) // _MAX_SAMPLES)].tolist())


def _bounds(result: SimulationResult) -> tuple[PhaseBound, ...]:
    """The bounds of each role."""
    bounds = []
    for role in dict.fromkeys(use.role for use in result.instances):
        uses = [use for use in result.instances if use.role == role]
        tokens = sum(use.prefill_tokens + use.decode_tokens for use in uses)
        label = f"{role}, {formatting.plural(len(uses), 'instance')}"
        bounds.append(phase_bound(role, label, uses, tokens, result.end_s))
    return tuple(bounds)
