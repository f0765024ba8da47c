"""Plots of one run: load over time, and the parts of the requests' time. Each is an `<svg>`, or None without data."""

from collections.abc import Mapping

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import FuncFormatter

from tandem.core.timeline import Stage
from tandem.placement.evaluation.summary import parts_of
from tandem.placement.report import formatting
from tandem.placement.report.style import HALF, as_svg, drawing_style, light, new_figure, only_vertical_grid
from tandem.placement.simulator.result import Floats, SimulationResult

_NUM_BINS = 60


def load_over_time(result: SimulationResult) -> tuple[Markup | None, Markup | None]:
    """(arrivals and completions per second, requests in the system), against the time since the first request."""
    received = result.stage(Stage.RECEIVED)
    received = received[~np.isnan(received)]
    if len(received) < 2:
        return None, None
    start_s = float(received.min())
    finished = result.stage(Stage.FINISHED)
    finished = finished[~np.isnan(finished)]
    edges = np.linspace(start_s, max(result.end_s, float(received.max()), start_s + 1e-9), _NUM_BINS + 1)
    counts = {"arrived": np.histogram(received, edges)[0], "finished": np.histogram(finished, edges)[0]}
    in_system = np.cumsum(counts["arrived"]) - np.cumsum(counts["finished"])
    rates = {name: count / np.diff(edges) for name, count in counts.items()}
    return _rates_plot(edges - start_s, rates), _in_system_plot(edges - start_s, in_system)


def _rates_plot(edges_s: Floats, rates: Mapping[str, Floats]) -> Markup:
    with drawing_style():
        figure = new_figure(HALF, 2.5)
        axes = figure.add_subplot()
        for (name, values), colour in zip(rates.items(), ("prefill", "decode"), strict=True):
            axes.stairs(values, edges_s, color=light(colour), linewidth=1.5, label=name)
        axes.set_ylim(0, 1.25 * max(float(values.max()) for values in rates.values()))
        axes.set_xlim(0, edges_s[-1])
        axes.set_title("Requests per second")
        axes.set_xlabel("seconds since the first request")
        axes.legend(loc="upper right", ncols=2)
        means = {name: float(np.mean(values)) for name, values in rates.items()}
        finished = formatting.rate(means["finished"])
        description = f"On average {formatting.rate(means['arrived'])} arrived and {finished} finished."
        return as_svg(figure, "rates", "Arrivals and completions over time", description)


def _in_system_plot(edges_s: Floats, in_system: Floats) -> Markup:
    with drawing_style():
        figure = new_figure(HALF, 2.5)
        axes = figure.add_subplot()
        axes.stairs(in_system, edges_s, fill=True, color=light("colocated"), alpha=0.5)
        axes.set_ylim(0, 1.1 * max(float(in_system.max()), 1.0))
        axes.set_xlim(0, edges_s[-1])
        axes.set_title("Requests in the system")
        axes.set_xlabel("seconds since the first request")
        maximum, last = formatting.count(int(in_system.max())), formatting.count(int(in_system[-1]))
        description = f"At most {maximum} requests were in the system, {last} at the end."
        return as_svg(figure, "in-system", "Requests in the system over time", description)


def timeline_parts(result: SimulationResult) -> Markup | None:
    """Mean and 99th percentile of each part of a request's timeline. None for a run without server timelines."""
    parts = parts_of(result)
    if "prefill_queue_s" not in parts:
        return None
    with drawing_style():
        figure = new_figure(2 * HALF, 0.9 + 0.3 * len(parts))
        axes = figure.add_subplot()
        p99 = {name: float(np.quantile(values, 0.99)) for name, values in parts.items()}
        top = max(p99.values()) or 1.0
        for row, (name, values) in enumerate(parts.items()):
            mean = float(np.mean(values))
            axes.barh(row, mean, height=0.6, color=light("prefill" if row < 4 else "decode"))
            axes.plot([mean, max(mean, p99[name])], [row, row], color=light("soft"), linewidth=1.2)
            axes.plot(p99[name], row, marker="|", markersize=9, color=light("soft"))
            text = f"{formatting.seconds(mean)} (99 %: {formatting.seconds(p99[name])})"
            axes.text(max(mean, p99[name]) + 0.012 * top, row, text, va="center")
        axes.set_yticks(range(len(parts)), [formatting.PART_NAMES[name] for name in parts])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.3 * top)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda time_s, _: formatting.tick(time_s)))
        axes.set_xlabel("seconds, mean of all requests (line: to the 99th percentile)")
        only_vertical_grid(axes)
        description = "; ".join(
            f"{formatting.PART_NAMES[name]} {formatting.seconds(float(np.mean(values)))}"
            for name, values in parts.items()
        )
        return as_svg(figure, "parts", "Mean time of a request by part", description)
