"""Plots of why this plan: candidates, bounds, sensitivity, error. Each is an `<svg>`, or None without data."""

import math
import textwrap
from collections.abc import Callable, Collection, Sequence

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from tandem.core.plan import Expected
from tandem.placement.evidence import Candidate, ErrorBudget, PhaseBound, SensitivityPoint
from tandem.placement.report import words
from tandem.placement.report.style import HALF, WIDE, as_svg, drawing_style, light, new_figure, only_vertical_grid

_LAYOUT_COLOURS = {"disaggregated": "prefill", "colocated": "colocated", "mixed": "mixed"}
_TERM_COLOURS = {
    "linear": "prefill",
    "attention": "sky",
    "kv_read": "decode",
    "collective": "amber",
    "pipeline": "plum",
    "head": "colocated",
    "overhead": "idle",
}
_AXIS_STYLES = {  # label, colour, marker, dashes
    "rate": ("rate", "ink", "o", "-"),
    "prompt_tokens": ("prompt length", "prefill", "s", "-"),
    "output_tokens": ("output length", "decode", "^", "-"),
    "ttft_target": ("TTFT target", "sky", "D", "--"),
    "tpot_target": ("TPOT target", "amber", "v", "--"),
}
_MAX_BARS = 12
_LABEL_WIDTH = 48


def candidate_bars(candidates: Sequence[Candidate]) -> Markup | None:
    """Goodput per device of the best candidates, the chosen one among them, with 95 % intervals."""
    simulated = [candidate for candidate in candidates if candidate.goodput is not None]
    shown = simulated[:_MAX_BARS]
    shown += [candidate for candidate in simulated[_MAX_BARS:] if candidate.chosen]
    if not shown:
        return None
    with drawing_style():
        labels = [textwrap.fill(candidate.description, _LABEL_WIDTH, break_on_hyphens=False) for candidate in shown]
        lines = 1 + max(label.count("\n") for label in labels)
        figure = new_figure(WIDE, 0.7 + (0.22 + 0.14 * lines) * len(shown))
        axes = figure.add_subplot()
        top = max(_high_per_device(candidate) for candidate in shown) or 1.0
        for row, candidate in enumerate(shown):
            _candidate_bar(axes, row, candidate, top)
        axes.set_yticks(range(len(shown)), labels)
        for label, candidate in zip(axes.get_yticklabels(), shown, strict=True):
            label.set_fontweight("bold" if candidate.chosen else "normal")
        axes.invert_yaxis()
        axes.set_xlim(0, 1.14 * top)
        axes.set_xlabel("goodput per device, requests per second")
        only_vertical_grid(axes)
        for layout in dict.fromkeys(candidate.layout for candidate in shown):
            axes.bar(0, 0, color=light(_LAYOUT_COLOURS[layout]), label=layout)
        figure.legend(loc="outside upper right", ncols=3)
        best = shown[0]
        said = (
            f"The best of {len(simulated)}: {best.description} with {words.rate(best.goodput_per_device)} per device."
        )
        return as_svg(figure, "candidates", "Goodput per device of each configuration", said)


def _candidate_bar(axes: Axes, row: int, candidate: Candidate, top: float) -> None:
    per_device = candidate.goodput_per_device or 0.0
    colour = light(_LAYOUT_COLOURS[candidate.layout])
    axes.barh(row, per_device, height=0.62, color=colour, alpha=1.0 if candidate.chosen else 0.45)
    if candidate.goodput_ci is not None:
        low, high = (bound / candidate.num_devices for bound in candidate.goodput_ci)
        axes.plot([low, high], [row, row], color=light("ink"), linewidth=1.1, marker="|", markersize=6)
    axes.text(
        _high_per_device(candidate) + 0.012 * top,
        row,
        words.number(per_device),
        va="center",
        fontweight="bold" if candidate.chosen else "normal",
    )


def _high_per_device(candidate: Candidate) -> float:
    high = candidate.goodput_ci[1] if candidate.goodput_ci is not None else candidate.goodput or 0.0
    return max(high, candidate.goodput or 0.0) / candidate.num_devices


def phase_bounds(bounds: Sequence[PhaseBound]) -> Markup | None:
    """What each phase's steps spend their time on, as shares, beside how busy its devices are."""
    busy = [bound for bound in bounds if sum(time_s for _, time_s in bound.cost_terms_s) > 0]
    if not busy:
        return None
    with drawing_style():
        figure = new_figure(WIDE, 1.0 + 0.55 * len(busy))
        axes = figure.add_subplot()
        seen: dict[str, str] = {}
        for row, bound in enumerate(busy):
            left, whole = 0.0, sum(time_s for _, time_s in bound.cost_terms_s)
            for term, time_s in bound.cost_terms_s:
                key, share = term.removesuffix("_s"), time_s / whole
                if share <= 0:
                    continue
                colour = _TERM_COLOURS.get(key, "idle")
                seen[words.term_name(term)] = colour
                axes.barh(
                    row, share, left=left, height=0.6, color=light(colour), edgecolor=light("paper"), linewidth=0.8
                )
                if share > 0.06:
                    axes.text(left + share / 2, row, f"{share:.0%}", ha="center", va="center", color=light("paper"))
                left += share
            axes.text(1.015, row, f"busy {words.percent(bound.utilisation)}", va="center", fontweight="bold")
        axes.set_yticks(range(len(busy)), [bound.label for bound in busy])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.15)
        axes.xaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: words.percent(share)))
        axes.set_xlabel("share of the time in steps")
        only_vertical_grid(axes)
        for label, colour in sorted(seen.items(), key=lambda item: list(_TERM_COLOURS.values()).index(item[1])):
            axes.bar(0, 0, color=light(colour), label=label)
        figure.legend(loc="outside upper center", ncols=len(seen), columnspacing=1.2, handlelength=1.0)
        said = " ".join(f"{bound.label} is bound by {words.term_name(bound.bound)}." for bound in busy)
        return as_svg(figure, "bounds", "What bounds each phase", said)


def sensitivity(points: Sequence[SensitivityPoint], expected: Expected | None) -> tuple[Markup | None, Markup | None]:
    """Goodput of the same plan, and attainment at its rate, when one thing of the question changes. What was asked
    itself, factor 1, is taken from `expected`."""
    goodput = [(point.axis, point.factor, point.goodput) for point in points if point.goodput is not None]
    attainment = [(point.axis, point.factor, point.attainment) for point in points if point.attainment is not None]
    if expected is not None:
        goodput += [(axis, 1.0, expected.goodput) for axis in {axis for axis, _, _ in goodput}]
        worst = min(expected.classes, key=lambda one: one.attainment - one.slo.attainment, default=None)
        if worst is not None:
            attainment += [(axis, 1.0, worst.attainment) for axis in {axis for axis, _, _ in attainment}]
    return (
        _sensitivity_plot(goodput, "sensitivity-goodput", "Goodput of this plan, requests per second", words.tick),
        _sensitivity_plot(attainment, "sensitivity-attainment", "Attainment at the plan's rate", words.percent),
    )


def _sensitivity_plot(
    points: Sequence[tuple[str, float, float]], name: str, title: str, show: Callable[[float], str]
) -> Markup | None:
    """Of (axis, factor, value)."""
    if not points:
        return None
    said = []
    with drawing_style():
        figure = new_figure(HALF, 3.3)
        axes = figure.add_subplot()
        for axis, (label, colour, marker, dashes) in _AXIS_STYLES.items():
            line = sorted({factor: value for one, factor, value in points if one == axis}.items())
            if line:
                xs, ys = zip(*line, strict=True)
                axes.plot(xs, ys, color=light(colour), marker=marker, markersize=4, linestyle=dashes, label=label)
                said.append(
                    f"{label} times {words.tick(xs[0])} to {words.tick(xs[-1])}: {show(ys[0])} to {show(ys[-1])}."
                )
        axes.axvline(1.0, color=light("soft"), linewidth=0.9, linestyle=(0, (5, 3)))
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(_apart({factor for _, factor, _ in points})))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda factor, _: f"×{words.tick(factor)}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
        axes.set_ylim(bottom=0)
        axes.set_title(title)
        axes.set_xlabel("times what was asked")
        figure.legend(loc="outside lower center", ncols=3, columnspacing=1.2)
        return as_svg(figure, name, title, " ".join(said))


def _apart(factors: Collection[float]) -> list[float]:
    """Those factors that leave room for each other's labels on a logarithmic axis; 1 always."""
    kept = [1.0]
    for factor in sorted(factors, key=lambda f: -abs(math.log(f))):
        if all(abs(math.log(factor / other)) > 0.16 for other in kept):
            kept.append(factor)
    return sorted(kept)


def error_intervals(error: ErrorBudget, expected: Expected | None) -> Markup | None:
    """The goodput claimed, as an interval for each reason why it may be wrong. The transient's claim can be many times
    larger: then it is an arrow."""
    if expected is None:
        return None
    goodput = expected.goodput
    rows = [("chance of the draw (95 %)", expected.goodput_ci)]
    if error.goodput_if_slower is not None and error.goodput_if_faster is not None:
        rows.append(
            (f"model error ±{words.percent(error.model_error)}", (error.goodput_if_slower, error.goodput_if_faster))
        )
    right = 1.6 * max([goodput, *(high for _, (_, high) in rows)]) or 1.0
    labels = [label for label, _ in rows]
    with drawing_style():
        figure = new_figure(WIDE, 0.75 + 0.4 * (len(rows) + (error.transient_goodput is not None)))
        axes = figure.add_subplot()
        axes.set_xlim(0, right)
        for row, (_, (low, high)) in enumerate(rows):
            axes.plot([low, high], [row, row], color=light("prefill"), linewidth=5, alpha=0.35, solid_capstyle="butt")
            axes.plot([low, high], [row, row], color=light("prefill"), linestyle="none", marker="|", markersize=9)
            _beside(axes, high, row, words.interval((low, high)))
        if (transient := error.transient_goodput) is not None:
            inside = transient <= 0.9 * right
            place = transient if inside else 0.9 * right
            axes.plot(place, len(rows), color=light("bad"), marker="D" if inside else ">", markersize=7)
            _beside(axes, place, len(rows), words.transient_claim(transient, goodput))
            labels.append("from an empty start (transient)")
        axes.axvline(goodput, color=light("ink"), linewidth=1.2)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlabel(f"goodput, requests per second (line: the claim, {words.number(goodput)})")
        only_vertical_grid(axes)
        said = " ".join(f"{label}: {words.interval(bounds)}." for label, bounds in rows)
        return as_svg(figure, "error", "How wrong the goodput may be", said)


def _beside(axes: Axes, value: float, row: int, text: str) -> None:
    axes.annotate(text, (value, row), xytext=(8, 0), textcoords="offset points", va="center")
