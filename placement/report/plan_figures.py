"""Plots that explain a plan: candidates, bounds, sensitivity, error. Each is an `<svg>`, or None without data."""

import math
import textwrap
from collections.abc import Callable, Collection, Sequence

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from tandem.core.plan import Expected
from tandem.placement.evidence import ErrorBudget, PhaseBound, PlanCandidate, SensitivityPoint
from tandem.placement.report import formatting
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


def candidate_bars(candidates: Sequence[PlanCandidate]) -> Markup | None:
    """Goodput per device of the best candidates and the chosen one, with 95 % intervals."""
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
        per_device = formatting.rate(best.goodput_per_device)
        description = f"The best of {len(simulated)}: {best.description} with {per_device} per device."
        return as_svg(figure, "candidates", "Goodput per device of each configuration", description)


def _candidate_bar(axes: Axes, row: int, candidate: PlanCandidate, top: float) -> None:
    per_device = candidate.goodput_per_device or 0.0
    colour = light(_LAYOUT_COLOURS[candidate.layout])
    axes.barh(row, per_device, height=0.62, color=colour, alpha=1.0 if candidate.chosen else 0.45)
    if candidate.goodput_ci is not None:
        low, high = (bound / candidate.num_devices for bound in candidate.goodput_ci)
        axes.plot([low, high], [row, row], color=light("ink"), linewidth=1.1, marker="|", markersize=6)
    axes.text(
        _high_per_device(candidate) + 0.012 * top,
        row,
        formatting.number(per_device),
        va="center",
        fontweight="bold" if candidate.chosen else "normal",
    )


def _high_per_device(candidate: PlanCandidate) -> float:
    high = candidate.goodput_ci[1] if candidate.goodput_ci is not None else candidate.goodput or 0.0
    return max(high, candidate.goodput or 0.0) / candidate.num_devices


def phase_bounds(bounds: Sequence[PhaseBound]) -> Markup | None:
    """The shares of each phase's step time by cause, and the utilisation of its devices."""
    busy = [bound for bound in bounds if sum(time_s for _, time_s in bound.cost_terms_s) > 0]
    if not busy:
        return None
    with drawing_style():
        figure = new_figure(WIDE, 1.0 + 0.55 * len(busy))
        axes = figure.add_subplot()
        colours: dict[str, str] = {}
        for row, bound in enumerate(busy):
            left, total_s = 0.0, sum(time_s for _, time_s in bound.cost_terms_s)
            for term, time_s in bound.cost_terms_s:
                key, share = term.removesuffix("_s"), time_s / total_s
                if share <= 0:
                    continue
                colour = _TERM_COLOURS.get(key, "idle")
                colours[formatting.term_name(term)] = colour
                axes.barh(
                    row, share, left=left, height=0.6, color=light(colour), edgecolor=light("paper"), linewidth=0.8
                )
                if share > 0.06:
                    axes.text(left + share / 2, row, f"{share:.0%}", ha="center", va="center", color=light("paper"))
                left += share
            axes.text(1.015, row, f"busy {formatting.percent(bound.utilisation)}", va="center", fontweight="bold")
        axes.set_yticks(range(len(busy)), [bound.label for bound in busy])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.15)
        axes.xaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: formatting.percent(share)))
        axes.set_xlabel("share of the time in steps")
        only_vertical_grid(axes)
        for label, colour in sorted(colours.items(), key=lambda item: list(_TERM_COLOURS.values()).index(item[1])):
            axes.bar(0, 0, color=light(colour), label=label)
        figure.legend(loc="outside upper center", ncols=len(colours), columnspacing=1.2, handlelength=1.0)
        description = " ".join(f"{bound.label} is bound by {formatting.term_name(bound.bound)}." for bound in busy)
        return as_svg(figure, "bounds", "Bounds of each phase", description)


def sensitivity(points: Sequence[SensitivityPoint], expected: Expected | None) -> tuple[Markup | None, Markup | None]:
    """Goodput of the plan, and attainment at its rate, with one parameter of the SLO file changed. The values for
    factor 1 are those of `expected`."""
    goodput = [(point.axis, point.factor, point.goodput) for point in points if point.goodput is not None]
    attainment = [(point.axis, point.factor, point.attainment) for point in points if point.attainment is not None]
    if expected is not None:
        goodput += [(axis, 1.0, expected.goodput) for axis in {axis for axis, _, _ in goodput}]
        worst = min(expected.classes, key=lambda of_class: of_class.attainment - of_class.slo.attainment, default=None)
        if worst is not None:
            attainment += [(axis, 1.0, worst.attainment) for axis in {axis for axis, _, _ in attainment}]
    return (
        _sensitivity_plot(goodput, "sensitivity-goodput", "Goodput of this plan, requests per second", formatting.tick),
        _sensitivity_plot(attainment, "sensitivity-attainment", "Attainment at the plan's rate", formatting.percent),
    )


def _sensitivity_plot(
    points: Sequence[tuple[str, float, float]], name: str, title: str, show: Callable[[float], str]
) -> Markup | None:
    """`points` are (axis, factor, value)."""
    if not points:
        return None
    sentences = []
    with drawing_style():
        figure = new_figure(HALF, 3.3)
        axes = figure.add_subplot()
        for axis, (label, colour, marker, dashes) in _AXIS_STYLES.items():
            line = sorted({factor: value for name_of, factor, value in points if name_of == axis}.items())
            if line:
                xs, ys = zip(*line, strict=True)
                axes.plot(xs, ys, color=light(colour), marker=marker, markersize=4, linestyle=dashes, label=label)
                factors = f"{formatting.tick(xs[0])} to {formatting.tick(xs[-1])}"
                sentences.append(f"{label} times {factors}: {show(ys[0])} to {show(ys[-1])}.")
        axes.axvline(1.0, color=light("soft"), linewidth=0.9, linestyle=(0, (5, 3)))
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(_tick_factors({factor for _, factor, _ in points})))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda factor, _: f"×{formatting.tick(factor)}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
        axes.set_ylim(bottom=0)
        axes.set_title(title)
        axes.set_xlabel("factor on the SLO file's value")
        figure.legend(loc="outside lower center", ncols=3, columnspacing=1.2)
        return as_svg(figure, name, title, " ".join(sentences))


def _tick_factors(factors: Collection[float]) -> list[float]:
    """1 and the factors whose labels do not overlap on a logarithmic axis."""
    kept = [1.0]
    for factor in sorted(factors, key=lambda factor: -abs(math.log(factor))):
        if all(abs(math.log(factor / other)) > 0.16 for other in kept):
            kept.append(factor)
    return sorted(kept)


def error_intervals(error: ErrorBudget, expected: Expected | None) -> Markup | None:
    """The predicted goodput with an interval for each source of error. A transient goodput beyond the axis is an
    arrow."""
    if expected is None:
        return None
    goodput = expected.goodput
    rows = [("random requests (95 %)", expected.goodput_ci)]
    if error.goodput_if_slower is not None and error.goodput_if_faster is not None:
        rows.append(
            (
                f"model error ±{formatting.percent(error.model_error)}",
                (error.goodput_if_slower, error.goodput_if_faster),
            )
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
            _annotate(axes, high, row, formatting.interval((low, high)))
        if (transient := error.transient_goodput) is not None:
            inside = transient <= 0.9 * right
            x = transient if inside else 0.9 * right
            axes.plot(x, len(rows), color=light("bad"), marker="D" if inside else ">", markersize=7)
            _annotate(axes, x, len(rows), formatting.transient_claim(transient, goodput))
            labels.append("from an empty start (transient)")
        axes.axvline(goodput, color=light("ink"), linewidth=1.2)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_xlabel(f"goodput, requests per second (line: predicted, {formatting.number(goodput)})")
        only_vertical_grid(axes)
        description = " ".join(f"{label}: {formatting.interval(bounds)}." for label, bounds in rows)
        return as_svg(figure, "error", "Error of the predicted goodput", description)


def _annotate(axes: Axes, value: float, row: int, text: str) -> None:
    axes.annotate(text, (value, row), xytext=(8, 0), textcoords="offset points", va="center")
