"""The HTML report of a plan: the instances, the reasons for them and the error of the prediction."""

from tandem.core.plan import Expected, Plan
from tandem.placement.evidence import Planned
from tandem.placement.report import formatting, latency_figures, plan_figures
from tandem.placement.report.advice_text import advice_sentences, change_rows, per_what
from tandem.placement.report.device_map import device_map, instance_labels
from tandem.placement.report.page import render

_SECTIONS = (
    ("changes", "What would help"),
    ("plan", "Plan"),
    ("candidates", "Configurations"),
    ("attainment", "Attainment"),
    ("latency", "Latencies"),
    ("bounds", "Bounds"),
    ("sensitivity", "Sensitivity"),
    ("error", "Error"),
    ("workload", "Workload"),
    ("reproduction", "Reproduction"),
)
_NUM_REJECTED = 8


def report_html(planned: Planned) -> str:
    """The HTML page. The same `planned` gives the same bytes."""
    plan, evidence = planned.plan, planned.evidence
    expected = plan.expected
    plan_rate = None if expected is None else expected.rate
    return render(
        "plan.html",
        title=f"{formatting.VERDICT_NAMES[plan.verdict]}: a plan for {plan.model}",
        subject=f"Plan for {plan.model}",
        badge=formatting.VERDICT_NAMES[plan.verdict],
        good=plan.verdict != "infeasible",
        headline=formatting.plan_sentence(planned),
        summary=plan.summary,
        advice=advice_sentences(planned),
        changes=change_rows(planned),
        per_what=per_what(planned),
        figures=_key_figures(plan),
        sections=_SECTIONS if evidence.advice is not None else _SECTIONS[1:],
        version=evidence.reproduction.version,
        plan=plan,
        expected=expected,
        plan_rate=formatting.rate(plan_rate),
        evidence=evidence,
        error=evidence.error,
        transient=_transient(evidence.error.transient_goodput, expected),
        device_map=device_map(plan, evidence.nodes),
        roles=list(dict.fromkeys(group.role for group in plan.groups)),
        group_labels=[_range(labels) for labels in instance_labels(plan.groups)],
        candidates_plot=plan_figures.candidate_bars(evidence.candidates),
        rejected=formatting.best_rejected(planned, _NUM_REJECTED),
        attainment_plots=[
            (attainment.slo.name, latency_figures.attainment_plot(attainment, plan_rate, f"attainment-{index}"))
            for index, attainment in enumerate(evidence.attainments)
        ],
        ttft_plot=latency_figures.ttft_cdf(evidence.latencies),
        tpot_plot=latency_figures.tpot_cdf(evidence.latencies),
        bounds_plot=plan_figures.phase_bounds(evidence.bounds),
        sensitivity_plots=plan_figures.sensitivity(evidence.sensitivity, expected),
        error_plot=plan_figures.error_intervals(evidence.error, expected),
        workload_plots=latency_figures.workload_histograms(evidence.workload),
    )


def _transient(transient_goodput: float | None, expected: Expected | None) -> str:
    """Empty if unknown."""
    if transient_goodput is None or expected is None:
        return ""
    return formatting.transient_claim(transient_goodput, expected.goodput)


def _key_figures(plan: Plan) -> list[tuple[str, str]]:
    """(label, value) for the top of the page."""
    expected = plan.expected
    figures = [("devices", f"{plan.num_devices:,}")]
    if expected is None:
        return figures
    worst = min(expected.classes, key=lambda of_class: of_class.attainment - of_class.slo.attainment, default=None)
    figures = [
        (f"goodput (95 %: {formatting.interval(expected.goodput_ci)})", formatting.rate(expected.goodput)),
        ("goodput per device", formatting.rate(expected.goodput_per_device)),
        *figures,
    ]
    if worst is not None:
        figures.append((f"within targets at {formatting.rate(expected.rate)}", formatting.percent(worst.attainment)))
    if expected.cost_per_hour is not None:
        figures.append(("per hour", f"${formatting.number(expected.cost_per_hour)}"))
    return figures


def _range(labels: list[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{labels[0]}–{labels[-1]}"
