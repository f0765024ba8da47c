"""The report of a plan: one HTML file that says what to run, why, and how sure that is."""

from tandem.core.plan import Expected, Plan
from tandem.placement.evidence import Planned
from tandem.placement.report import latency_figures, plan_figures, words
from tandem.placement.report.floor import floor_plan, instance_labels
from tandem.placement.report.page import render

_SECTIONS = (
    ("plan", "Plan"),
    ("candidates", "Configurations"),
    ("attainment", "Attainment"),
    ("latency", "Latencies"),
    ("bounds", "Bounds"),
    ("sensitivity", "Sensitivity"),
    ("error", "Error"),
    ("workload", "Workload"),
    ("again", "Again"),
)
_NUM_REJECTED = 8


def report_html(planned: Planned) -> str:
    """The page. The same `planned` gives the same bytes."""
    plan, evidence = planned.plan, planned.evidence
    expected = plan.expected
    asked = None if expected is None else expected.rate
    return render(
        "plan.html",
        title=f"{words.VERDICT_NAMES[plan.verdict]}: a plan for {plan.model}",
        kicker=f"Plan for {plan.model}",
        pill=words.VERDICT_NAMES[plan.verdict],
        good=plan.verdict != "infeasible",
        headline=words.answer(planned),
        summary=plan.summary,
        figures=_key_figures(plan),
        sections=_SECTIONS,
        version=evidence.reproduction.version,
        plan=plan,
        expected=expected,
        judged_rate=words.rate(asked),
        evidence=evidence,
        error=evidence.error,
        transient=_transient(evidence.error.transient_goodput, expected),
        floor=floor_plan(plan, evidence.nodes),
        roles=list(dict.fromkeys(group.role for group in plan.groups)),
        group_labels=[_range(labels) for labels in instance_labels(plan.groups)],
        candidates_plot=plan_figures.candidate_bars(evidence.candidates),
        rejected=words.best_rejected(planned, _NUM_REJECTED),
        curves=[
            (curve.slo.name, latency_figures.attainment_curve(curve, asked, f"attainment-{index}"))
            for index, curve in enumerate(evidence.curves)
        ],
        ttft_plot=latency_figures.ttft_cdf(evidence.latencies),
        tpot_plot=latency_figures.tpot_cdf(evidence.latencies),
        bounds_plot=plan_figures.phase_bounds(evidence.bounds),
        sensitivity_plots=plan_figures.sensitivity(evidence.sensitivity, expected),
        error_plot=plan_figures.error_intervals(evidence.error, expected),
        workload_plots=latency_figures.workload_histograms(evidence.workload),
    )


def _transient(transient_goodput: float | None, expected: Expected | None) -> str:
    """Empty where nobody looked."""
    if transient_goodput is None or expected is None:
        return ""
    return words.transient_claim(transient_goodput, expected.goodput)


def _key_figures(plan: Plan) -> list[tuple[str, str]]:
    """(what, value) for the top of the page."""
    expected = plan.expected
    figures = [("devices", f"{plan.num_devices:,}")]
    if expected is None:
        return figures
    low = min(expected.classes, key=lambda c: c.attainment - c.slo.attainment, default=None)
    figures = [
        (f"goodput (95 %: {words.interval(expected.goodput_ci)})", words.rate(expected.goodput)),
        ("goodput per device", words.rate(expected.goodput_per_device)),
        *figures,
    ]
    if low is not None:
        figures.append((f"within targets at {words.rate(expected.rate)}", words.percent(low.attainment)))
    if expected.cost_per_hour is not None:
        figures.append(("an hour", f"${words.number(expected.cost_per_hour)}"))
    return figures


def _range(labels: list[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{labels[0]}–{labels[-1]}"
