"""What a user should know first of a plan, in sentences: cost, distance from targets, changes that help, layouts."""

import math

import numpy as np

from tandem.core.plan import Expected, ExpectedClass
from tandem.placement.evidence import Advice, Change, LatencySample, LayoutComparison, Planned
from tandem.placement.report.formatting import join, number, percent, plural, rate, seconds

_NUM_CHANGES = 2  # that are named beside the most helpful one
_AXES = {
    "prompt_tokens": ("prompts", "shorter", "longer"),
    "output_tokens": ("answers", "shorter", "longer"),
    "ttft_target": ("TTFT targets", "tighter", "looser"),
    "tpot_target": ("TPOT targets", "tighter", "looser"),
}


def advice_sentences(planned: Planned) -> list[str]:
    """One sentence or two for each question. Empty for a plan without instances."""
    expected, advice = planned.plan.expected, planned.evidence.advice
    if expected is None:
        return []
    sentences = [_cost(expected, planned.plan.num_devices)]
    for of_class, latencies in zip(expected.classes, planned.evidence.latencies, strict=False):
        sentences.append(_distance(expected, of_class, latencies))
    if advice is not None:
        sentences += [text for text in (_changes(advice, planned), _layouts(advice.layouts)) if text]
    return sentences


def change_rows(planned: Planned) -> list[tuple[str, str, str, str]]:
    """Of each change: what, goodput, its difference, and its difference per USD (or per device)."""
    advice, expected = planned.evidence.advice, planned.plan.expected
    if advice is None or expected is None:
        return []
    return [
        (
            change.description,
            rate(change.goodput),
            f"{_signed(change.goodput / expected.goodput - 1)} ({_interval(change, expected) or 'predicted'})",
            _signed(_usefulness_gain(change, expected, planned.plan.num_devices)),
        )
        for change in advice.changes
    ]


def per_what(planned: Planned) -> str:
    return "device" if planned.plan.expected is None or planned.plan.expected.cost_per_hour is None else "USD"


def _cost(expected: Expected, num_devices: int) -> str:
    thousand_hours = 1000 / expected.rate / 3600
    if expected.cost_per_hour is None:
        return f"A thousand requests take {number(num_devices * thousand_hours)} device hours at {rate(expected.rate)}."
    return (
        f"A thousand requests cost {number(expected.cost_per_hour * thousand_hours)} USD at {rate(expected.rate)} "
        f"({number(expected.cost_per_hour)} USD per hour)."
    )


def _distance(expected: Expected, of_class: ExpectedClass, latencies: LatencySample) -> str:
    """How far from the targets the share of the requests is that must meet them."""
    slo = of_class.slo
    parts = []
    for name, values, target_s in (("TTFT", latencies.ttft_s, slo.ttft_s), ("TPOT", latencies.tpot_s, slo.tpot_s)):
        if values:
            reached_s = float(np.quantile(values, slo.attainment))
            parts.append((1 - reached_s / target_s, name, reached_s, target_s))
    if not parts:
        return f"No request of class {slo.name} got a token."
    parts.sort()
    text = join([f"{name} {seconds(reached_s)} of {seconds(target_s)}" for _, name, reached_s, target_s in parts])
    spare, edge = parts[0][:2]
    where = f"{edge} is the edge, with {percent(spare)} to spare" if spare >= 0 else f"{edge} is {percent(-spare)} over"
    return (
        f"Class {slo.name}: {percent(of_class.attainment)} meet both targets at {rate(expected.rate)}, and "
        f"{percent(slo.attainment)} must. {percent(slo.attainment)} of them stay within {text}: {where}."
    )


def _changes(advice: Advice, planned: Planned) -> str:
    expected = planned.plan.expected
    if not advice.changes or expected is None or expected.goodput == 0:
        return ""
    per, num_devices = per_what(planned), planned.plan.num_devices

    def named(change: Change) -> str:
        gain, useful = change.goodput / expected.goodput - 1, _usefulness_gain(change, expected, num_devices)
        more = [] if math.isclose(gain, useful, abs_tol=5e-4) else [f"{_signed(useful)} per {per}"]
        interval = [found] if (found := _interval(change, expected)) else []
        return f"{change.description} ({', '.join([f'{_signed(gain)} goodput', *interval, *more])})"

    first, *rest = advice.changes
    helps = _usefulness_gain(first, expected, num_devices) > 0.005
    begin = "The single change that helps most" if helps else f"No single change gives more per {per}; the best"
    others = [change for change in rest if change.goodput > expected.goodput * 1.005][:_NUM_CHANGES]
    then = f" Then: {'; '.join(map(named, others))}." if others else ""
    how = "as predicted" if first.interval is None else "simulated on the same requests"
    return f"{begin}, {how}: {named(first)}.{then}"


def _interval(change: Change, expected: Expected) -> str:
    """Of the difference in goodput; empty if it is predicted."""
    if change.interval is None:
        return ""
    low, high = (_signed(end / expected.goodput - 1) for end in change.interval)
    return f"95 %: {low.removesuffix(' %')} to {high}"


def _layouts(layouts: LayoutComparison | None) -> str:
    if layouts is None:
        return ""
    is_better = layouts.ratio < 1  # the chosen one
    pays = layouts.is_disaggregated == is_better
    text = f"{_which_layout(layouts, is_better=is_better, pays=pays)}."
    other = [_changed(axis, factor) for axis, factor, ratio in layouts.changed if (ratio < 1) != is_better]
    when = " or ".join(other)
    if pays and other:
        return f"{text} Do not disaggregate with {when}: colocated instances then serve more, as predicted."
    if pays and layouts.changed:
        return f"{text} As predicted, it also does with lengths and targets of 0.75 and 1.5 times these."
    return f"{text} It would pay with {when}, as predicted." if other else text


def _which_layout(layouts: LayoutComparison, *, is_better: bool, pays: bool) -> str:
    verdict = "Disaggregation pays" if pays else "Do not disaggregate"
    better, worse = (layouts.chosen, layouts.rival) if is_better else (layouts.rival, layouts.chosen)
    if layouts.interval is None:
        return f"{verdict}, as predicted: {better} serves more per device than {worse}"
    if layouts.ratio == 0:
        return f"{verdict}: {worse} misses the targets at every rate"
    ratio, (low, high) = layouts.ratio, layouts.interval
    if is_better:
        ratio, low, high = 1 / ratio, 1 / high, 1 / low
    if low <= 1:
        verdict = "Whether to disaggregate hardly matters"
    layout = "colocated" if layouts.is_disaggregated else "disaggregated"
    return (
        f"{verdict}: {better} has {ratio:.2f} times the goodput per device of {worse} (95 %: {low:.2f} to {high:.2f}; "
        f"{plural(layouts.num_compared, f'{layout} configuration')} simulated on the same requests)"
    )


def _changed(axis: str, factor: float) -> str:
    what, less, more = _AXES[axis]
    return f"{what} {abs(factor - 1):.0%} {less if factor < 1 else more}".replace("%", " %")


def _usefulness_gain(change: Change, expected: Expected, num_devices: int) -> float:
    """Of goodput per USD, or per device without prices."""
    before = expected.goodput / (expected.cost_per_hour or num_devices)
    return change.goodput / (change.cost_per_hour or change.num_devices) / before - 1


def _signed(share: float) -> str:
    return f"{100 * share:+.0f} %"
