"""Plots of attainment, latencies and lengths. Each is an `<svg>`, or None without data."""

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from tandem.core.slo import SloClass
from tandem.placement.evidence import ClassAttainment, LatencySample, WorkloadSummary
from tandem.placement.report import formatting
from tandem.placement.report.style import HALF, WIDE, as_svg, drawing_style, light, new_figure

_CLASS_STYLES = (("prefill", "-"), ("decode", "--"), ("colocated", "-."), ("mixed", ":"))
_MAX_CDF_POINTS = 300
_LOG_RATIO = 40  # longest to shortest latency from which an axis is logarithmic


def attainment_plot(attainment: ClassAttainment, plan_rate: float | None, name: str) -> Markup | None:
    """Share of requests within their targets against rate, with its interval, the required share and the knee."""
    if not attainment.points:
        return None
    slo, points = attainment.slo, attainment.points
    rates = [point.rate for point in points]
    with drawing_style():
        figure = new_figure(WIDE, 3.4)
        axes = figure.add_subplot()
        low, high = zip(*(point.both_ci for point in points), strict=True)
        axes.fill_between(rates, low, high, color=light("prefill"), alpha=0.18, linewidth=0, label="95 % interval")
        axes.plot(rates, [point.both for point in points], color=light("prefill"), marker="o", markersize=3.5)
        axes.lines[-1].set_label("both targets")
        axes.plot(rates, [point.ttft for point in points], color=light("amber"), linestyle="--", linewidth=1.3)
        axes.lines[-1].set_label(f"TTFT within {formatting.seconds(slo.ttft_s)}")
        axes.plot(rates, [point.tpot for point in points], color=light("colocated"), linestyle=":", linewidth=1.8)
        axes.lines[-1].set_label(f"TPOT within {formatting.seconds(slo.tpot_s)}")
        axes.axhline(slo.attainment, color=light("soft"), linewidth=1.0, linestyle=(0, (5, 3)))
        floor = min(*low, slo.attainment, 0.5) - 0.03
        axes.set_ylim(max(floor, -0.03), 1.03)
        axes.set_xlim(left=0, right=1.02 * rates[-1])
        axes.text(
            0.006 * rates[-1],
            slo.attainment,
            f"required {formatting.percent(slo.attainment)}",
            va="bottom",
            color=light("soft"),
        )
        _mark_rates(axes, attainment.knee_rate, plan_rate, slo.attainment)
        axes.set_xlabel("rate, requests per second")
        axes.set_ylabel("requests within target")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: formatting.percent(share)))
        axes.legend(loc="lower left")
        knee = "at no rate" if attainment.knee_rate is None else f"up to {formatting.rate(attainment.knee_rate)}"
        description = f"Class {slo.name} keeps {formatting.percent(slo.attainment)} {knee}."
        return as_svg(figure, name, "Attainment against rate", description)


def _mark_rates(axes: Axes, knee_rate: float | None, plan_rate: float | None, required: float) -> None:
    """Vertical lines with labels. The label of the left line is on its left side, so labels do not overlap."""
    marks: list[tuple[float, str, str]] = []
    if plan_rate is not None and not (knee_rate is not None and math.isclose(plan_rate, knee_rate, rel_tol=0.02)):
        marks.append((plan_rate, f"evaluated at {formatting.rate(plan_rate)}", "bad"))
    if knee_rate is not None:
        marks.append((knee_rate, f"knee {formatting.rate(knee_rate)}", "ink"))
        axes.plot(
            knee_rate,
            required,
            color=light("ink"),
            marker="o",
            markersize=7,
            markerfacecolor="none",
            markeredgecolor=light("ink"),
        )
    marks.sort()
    right = axes.get_xlim()[1]
    for index, (rate, label, colour) in enumerate(marks):
        label_left = rate > 0.75 * right if len(marks) == 1 else index == 0
        axes.axvline(rate, color=light(colour), linewidth=1.1, linestyle=(0, (2, 2)))
        axes.annotate(
            label,
            (rate, axes.get_ylim()[0]),
            xytext=(-5, 6) if label_left else (5, 6),
            textcoords="offset points",
            ha="right" if label_left else "left",
            color=light(colour),
            fontweight="bold",
        )


def ttft_cdf(samples: Sequence[LatencySample], name: str = "ttft") -> Markup | None:
    return _cdf([(sample.slo, sample.ttft_s, sample.slo.ttft_s) for sample in samples], name, "Time to first token")


def tpot_cdf(samples: Sequence[LatencySample], name: str = "tpot") -> Markup | None:
    return _cdf([(sample.slo, sample.tpot_s, sample.slo.tpot_s) for sample in samples], name, "Time per output token")


def _cdf(lines: Sequence[tuple[SloClass, Sequence[float], float]], name: str, title: str) -> Markup | None:
    """Cumulative distributions of (class, times, target) with a line at each target; logarithmic over a large range."""
    lines = [line for line in lines if line[1]]
    if not lines:
        return None
    merged = np.concatenate([np.asarray(times) for _, times, _ in lines])
    low, high = np.quantile(merged, (0.02, 0.995))
    sentences = []
    with drawing_style():
        figure = new_figure(HALF, 2.9)
        axes = figure.add_subplot()
        for index, (slo, times, target_s) in enumerate(lines):
            colour, dashes = _CLASS_STYLES[index % len(_CLASS_STYLES)]
            shares = np.linspace(0, 1, min(_MAX_CDF_POINTS, len(times) + 1))
            axes.plot(np.quantile(times, shares), shares, color=light(colour), linestyle=dashes, label=slo.name)
            axes.axvline(target_s, color=light("bad"), linestyle=dashes, linewidth=1.1)
            met = float(np.mean(np.asarray(times) <= target_s))
            sentences.append(
                f"{formatting.percent(met)} of class {slo.name} are within {formatting.seconds(target_s)}."
            )
        low, high = min(low, *(t for _, _, t in lines)), max(high, *(t for _, _, t in lines))
        if low > 0 and high / low > _LOG_RATIO:
            axes.set_xscale("log")
            axes.set_xlim(low / 1.3, high * 1.3)
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_xlim(0, 1.08 * high)
        _latency_axis(axes, high)
        axes.set_ylim(0, 1.02)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: formatting.percent(share)))
        axes.set_title(title)
        axes.plot([], [], color=light("bad"), linewidth=1.1, label="target")
        if len(lines) > 1:
            figure.legend(loc="outside lower center", ncols=min(3, len(lines) + 1))
        else:
            axes.legend(loc="best")
        return as_svg(figure, name, f"{title}, cumulative distribution", " ".join(sentences))


def _latency_axis(axes: Axes, high_s: float) -> None:
    """One unit for the axis, named in its label."""
    unit, factor = ("ms", 1e3) if high_s < 2.0 else ("s", 1.0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda time_s, _: formatting.tick(time_s * factor)))
    axes.set_xlabel(unit)


def workload_histograms(workload: WorkloadSummary) -> tuple[Markup | None, Markup | None]:
    return (
        _length_histogram(workload.prompt_tokens, "prompt-lengths", "Prompt lengths", "prefill"),
        _length_histogram(workload.output_tokens, "output-lengths", "Output lengths", "decode"),
    )


def _length_histogram(tokens: Sequence[int], name: str, title: str, colour: str) -> Markup | None:
    if not tokens:
        return None
    low, high = max(1, min(tokens)), max(tokens)
    with drawing_style():
        figure = new_figure(HALF, 1.9)
        axes = figure.add_subplot()
        if high > 30 * low:
            edges = np.geomspace(low, high + 1, 41)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            edges = np.linspace(low, high + 1, min(40, high + 1 - low) + 1)
        counts, _ = np.histogram(tokens, edges)
        axes.stairs(counts / len(tokens), edges, fill=True, color=light(colour), alpha=0.55)
        mean = float(np.mean(tokens))
        axes.axvline(mean, color=light("ink"), linewidth=1.1, linestyle=(0, (2, 2)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: formatting.tick(tokens)))
        axes.yaxis.set_major_locator(NullLocator())
        axes.set_title(title)
        axes.set_xlabel(f"tokens (mean {formatting.number(mean)})")
        p50, p99 = np.quantile(tokens, (0.5, 0.99))
        quantiles = f"median {formatting.number(p50)}, 99th percentile {formatting.number(p99)} tokens."
        return as_svg(figure, name, title, f"Mean {formatting.number(mean)}, {quantiles}")
