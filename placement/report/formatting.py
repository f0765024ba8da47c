"""Numbers and sentences for reports and terminals: three significant digits, always with a unit."""

import math
from collections.abc import Sequence

from tandem.core.plan import Plan, PlanGroup
from tandem.placement.evidence import PlanCandidate, Planned

TERM_NAMES = {
    "linear": "linear layers",
    "attention": "prompt attention",
    "kv_read": "KV reads",
    "collective": "collectives",
    "pipeline": "pipeline transfers",
    "head": "embedding and sampling",
    "overhead": "overhead",
}
PART_NAMES = {  # see core.timeline.PARTS
    "admission_s": "admission",
    "dispatch_s": "dispatch",
    "prefill_queue_s": "prefill queue",
    "prefill_s": "prefill",
    "transfer_s": "KV transfer",
    "decode_queue_s": "decode queue",
    "second_token_s": "second token",
    "decode_s": "decode",
}
_NO_LIMIT = 50.0  # ratio of transient to steady-state goodput
VERDICT_NAMES = {
    "disaggregate": "Disaggregate",
    "colocate": "Colocate",
    "mixed": "Mix both",
    "infeasible": "Infeasible",
}


def number(value: float | None) -> str:
    """Three significant digits, no exponent below a million: 0.0123, 1.23, 12.3, 1,230."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    digits = 2 - math.floor(math.log10(abs(value)))
    rounded = round(value, digits)
    if abs(rounded) >= 1e6:
        return f"{rounded:.3g}"
    decimals = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{decimals}f}"


def tick(value: float) -> str:
    """A number on an axis: 0.5, 10, 1,500."""
    return f"{float(f'{value:.6g}'):,.15g}"


def count(value: int) -> str:
    """A whole number with commas."""
    return f"{value:,}"


def seconds(value: float | None) -> str:
    """A time in a suitable unit: 85.2 µs, 12.3 ms, 1.23 s, 12.3 min."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0 s"
    size = abs(value)
    for limit, factor, unit in ((0.0009995, 1e6, "µs"), (0.9995, 1e3, "ms"), (599.5, 1.0, "s")):
        if size < limit:
            return f"{number(value * factor)} {unit}"
    return f"{number(value / 60)} min"


def percent(share: float | None) -> str:
    """91.2 %; 100 % only for exactly 1."""
    if share is None or not math.isfinite(share):
        return "–"
    text = f"{100 * share:.1f}"
    return f"{'>99.9' if text == '100.0' and share < 1 else text.removesuffix('.0')} %"


def rate(value: float | None) -> str:
    return f"{number(value)} req/s"


def interval(bounds: Sequence[float] | None, show: str = "number") -> str:
    """'1.23 to 4.56', formatted by `number` or `percent`."""
    if bounds is None:
        return "–"
    low, high = bounds
    if show == "percent":
        return f"{percent(low).removesuffix(' %')} to {percent(high)}"
    return f"{number(low)} to {number(high)}"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def join(parts: Sequence[str]) -> str:
    """'a, b and c'."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def term_name(term: str) -> str:
    """The name of a StepCost term in a report; an unknown term with spaces for underscores."""
    name = term.removesuffix("_s")
    return TERM_NAMES.get(name, name.replace("_", " "))


def describe_groups(groups: Sequence[PlanGroup]) -> str:
    """'2 prefill instances (tp2) and 1 decode instance (tp4) on H100'."""
    devices = {group.device for group in groups}
    parts = [f"{plural(group.instances, f'{group.role} instance')} ({group.shape}" for group in groups]
    if len(devices) == 1:
        return f"{join([f'{part})' for part in parts])} on {groups[0].device}"
    return join([f"{part} on {group.device})" for part, group in zip(parts, groups, strict=True)])


def headline(planned: Planned) -> str:
    """The verdict and the plan in one sentence."""
    text = plan_sentence(planned)
    return f"{VERDICT_NAMES[planned.plan.verdict]}: {text[:1].lower()}{text[1:]}"


def plan_sentence(planned: Planned) -> str:
    """The instances and their goodput, or the nearest feasible targets, in one sentence."""
    if planned.plan.verdict == "infeasible":
        nearest = planned.evidence.nearest or "no evaluated deployment meets the targets"
        return f"{nearest[:1].upper()}{nearest[1:].rstrip('.')}."
    return describe_plan(planned.plan)


def describe_plan(plan: Plan) -> str:
    """The instances and, if known, their goodput in one sentence."""
    instances, expected = describe_groups(plan.groups), plan.expected
    if expected is None:
        return f"{instances}."
    serve = "serves" if sum(group.instances for group in plan.groups) == 1 else "serve"
    per_device = number(expected.goodput_per_device)
    return f"{instances} {serve} {rate(expected.goodput)} within the targets, {per_device} per device."


def transient_claim(transient: float, goodput: float) -> str:
    """The transient goodput; 'no limit' if a few hundred requests end before queues grow, at any rate."""
    return "no limit" if transient > _NO_LIMIT * max(goodput, 1e-9) else rate(transient)


def best_rejected(planned: Planned, count: int) -> list[PlanCandidate]:
    """The rejected candidates in falling goodput per device; candidates without simulation last."""
    rejected = [candidate for candidate in planned.evidence.candidates if not candidate.chosen]
    return sorted(rejected, key=lambda c: -(c.goodput_per_device or -1.0))[:count]
