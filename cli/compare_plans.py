"""`tandem plan --compare`: two plans on the same requests."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import RenderableType

from tandem.cli.output import table
from tandem.core.config_file import load_config
from tandem.core.errors import ConfigError
from tandem.core.plan import Plan
from tandem.core.slo_file import SloFile
from tandem.placement.plan_comparison import ComparedPlan, ComparedRate, Difference
from tandem.placement.report import formatting


def compared_plan(path: Path) -> ComparedPlan:
    """Raises ConfigError."""
    plan = load_config(path, Plan)
    if plan.slo_file is None:
        raise ConfigError(f"{path} names no SLO file, so its cluster is not known; set slo_file in the plan")
    if not plan.groups:
        raise ConfigError(f"{path} has no instances")
    return ComparedPlan(path.name, plan, load_config(plan.slo_file, SloFile))


def rates_of(plans: Sequence[ComparedPlan], slo_file: SloFile) -> list[float]:
    """The rate of the workload, or else those for which the plans were made. Raises ConfigError."""
    if slo_file.workload.rate != "max":
        return [slo_file.workload.rate]
    rates = sorted({each.plan.expected.rate for each in plans if each.plan.expected is not None})
    if not rates:
        raise ConfigError("neither the plans nor the SLO file say how many requests come per second; set workload.rate")
    return rates


def describe_comparison(
    plans: tuple[ComparedPlan, ComparedPlan], rates: Sequence[ComparedRate]
) -> list[RenderableType]:
    """For a terminal."""
    parts: list[RenderableType] = []
    header = ["", *(plan.name for plan in plans), "DIFFERENCE (95 %)", ""]
    for compared in rates:
        rows = [["  devices", *(str(plan.plan.num_devices) for plan in plans), "", ""]]
        costs = [plan.cost_per_hour for plan in plans]
        if all(cost is not None for cost in costs):
            rows.append(
                ["  USD per thousand requests"]
                + [formatting.number((cost or 0.0) / compared.rate / 3.6) for cost in costs]
                + ["", ""]
            )
        rows += [
            _row("  met both targets", compared.attainment, plans, better_is_more=True),
            _row("  TTFT, mean", compared.ttft_s, plans, better_is_more=False),
            _row("  TPOT, mean", compared.tpot_s, plans, better_is_more=False),
        ]
        if any(compared.cached_shares):
            rows.append(["  prompt tokens found cached", *map(formatting.percent, compared.cached_shares), "", ""])
        meets = ["yes" if evaluation.meets else "no" for evaluation in compared.evaluations]
        rows.append(["  all targets are met", *meets, "", ""])
        parts += [f"at {formatting.rate(compared.rate)}", table(header, rows), ""]
    return [*parts, _conclusion(plans, rates)]


def _row(name: str, difference: Difference, plans: Sequence[ComparedPlan], *, better_is_more: bool) -> list[str]:
    show = formatting.percent if better_is_more else formatting.seconds
    values = [show(mean) for mean in difference.means]
    if difference.interval is None:
        return [name, *values, "-", ""]
    low, high = difference.interval
    scale, unit = (100.0, "points") if better_is_more else (1000.0, "ms")
    interval = f"{scale * low:+.3g} to {scale * high:+.3g} {unit}"
    if not difference.is_certain:
        return [name, *values, interval, "not told apart"]
    better = plans[0] if (low > 0) == better_is_more else plans[1]
    return [name, *values, interval, f"{better.name} is better"]


def _conclusion(plans: Sequence[ComparedPlan], rates: Sequence[ComparedRate]) -> str:
    highest = [
        max((compared.rate for compared in rates if compared.evaluations[index].meets), default=0.0) for index in (0, 1)
    ]
    if highest[0] != highest[1]:
        more = 0 if highest[0] > highest[1] else 1
        rate = formatting.rate(highest[more])
        return f"{plans[more].name} meets its targets at {rate}, and {plans[1 - more].name} does not."
    certain = [compared.attainment.interval for compared in rates if compared.attainment.is_certain]
    if not certain:
        text = "By their attainment the plans cannot be told apart at these rates"
        costs = [plan.cost_per_hour for plan in plans]
        if None in costs or costs[0] == costs[1]:
            return f"{text}."
        return f"{text}; {min(plans, key=lambda plan: plan.cost_per_hour or 0.0).name} costs less."
    firsts = {interval is not None and interval[0] > 0 for interval in certain}
    if len(firsts) == 2:
        return "Which plan is better depends on the rate."
    return f"More requests meet their targets with {plans[0].name if firsts.pop() else plans[1].name}."
