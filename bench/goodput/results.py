"""The curves and goodputs of all cells in a folder, as values, a table and a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import PercentFormatter

from bench.goodput.cells import GoodputCell
from bench.goodput.curve import LEVELS, Goodput, RatePoint, Targets, goodput, rate_point, tails
from bench.goodput.deployments import PLANNED, SYSTEMS, VLLM
from tandem.core.text_table import text_table
from tandem.placement.report.style import drawing_style, light, new_figure

_COLOURS = {
    "planned": "plum",
    "planned-balanced": "mixed",
    "disaggregated": "prefill",
    "colocated": "colocated",
    "vllm": "amber",
}


@dataclass(frozen=True, slots=True)
class Curve:
    """Attainment of one system on one workload against the rate, for the targets of one scale. `points` by rate."""

    workload: str
    system: str
    deployment: str
    scale: float
    targets: Targets
    points: tuple[RatePoint, ...]
    cells: tuple[GoodputCell, ...]

    def goodput(self, level: float) -> Goodput:
        return goodput(self.points, level)

    def as_json(self) -> dict[str, object]:
        return {
            "workload": self.workload,
            "system": self.system,
            "deployment": self.deployment,
            "note": self.cells[0].note,
            "scale": self.scale,
            "targets": asdict(self.targets),
            "goodput": {f"{level:g}": asdict(self.goodput(level)) for level in LEVELS},
            "points": [
                asdict(point)
                | {"attainment": point.attainment, "interval": point.interval, "latency": tails(cell.records)}
                | {"generator": cell.generator, "fault": cell.fault, "others_cores": cell.others_cores}
                for point, cell in zip(self.points, self.cells, strict=True)
            ],
        }


def curves_of(cells: Sequence[GoodputCell], targets: Mapping[str, Mapping[float, Targets]]) -> list[Curve]:
    """One for each workload, system and scale that has cells. `targets`: by workload and scale. Plans count for the
    scales that they were made for, other deployments for all. Cells that the generator may have distorted count, with
    their fault."""
    curves = []
    for workload, deployment in dict.fromkeys((cell.workload, cell.deployment) for cell in cells):
        same = (cell for cell in cells if (cell.workload, cell.deployment) == (workload, deployment))
        own = tuple(sorted(same, key=lambda cell: cell.rate))
        of_workload = targets.get(workload, {})
        scales = {scale for cell in own for scale in cell.scales} if own[0].system in PLANNED else set(of_workload)
        for scale in sorted(scales & set(of_workload), reverse=True):
            points = tuple(rate_point(cell.rate, cell.records, of_workload[scale]) for cell in own)
            curves.append(Curve(workload, own[0].system, deployment, scale, of_workload[scale], points, own))
    order = list(SYSTEMS)
    return sorted(curves, key=lambda curve: (curve.workload, -curve.scale, order.index(curve.system)))


def goodput_table(curves: Sequence[Curve]) -> str:
    """A line for each curve: goodput with its brackets, and the ratio to vLLM's on the same workload and targets."""
    header = [
        "WORKLOAD",
        "TARGETS (ms)",
        "SYSTEM",
        "GOODPUT 90 %",
        "FAILS AT",
        "SURELY",
        "GOODPUT 99 %",
        "OF VLLM'S",
        "",
    ]
    rows = []
    for curve in curves:
        at_90, at_99 = (curve.goodput(level) for level in LEVELS)
        base = next((other.goodput(0.9).rate for other in curves if _is_vllm_of(other, curve)), 0.0)
        surely, surely_not = at_90.surely
        faults = sum(cell.fault is not None for cell in curve.cells)
        rows.append(
            [
                curve.workload,
                f"{curve.targets.ttft_s * 1e3:.0f}, {curve.targets.tpot_s * 1e3:.1f}",
                curve.system,
                f"{at_90.rate:.2f}",
                _rate(at_90.missed_at),
                f"{surely:.2f} to {_rate(surely_not)}",
                f"{at_99.rate:.2f}",
                f"{at_90.rate / base:.2f}" if base else "-",
                f"{faults} runs distorted by the client" if faults else "",
            ]
        )
    return "\n".join(text_table([header, *rows]))


def _is_vllm_of(other: Curve, curve: Curve) -> bool:
    return other.system == VLLM and (other.workload, other.scale) == (curve.workload, curve.scale)


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.2f}"


def point_line(curve: Curve, rate: float) -> str:
    """What one cell has shown for the targets of the curve."""
    index = next(index for index, point in enumerate(curve.points) if point.rate == rate)
    point, cell = curve.points[index], curve.cells[index]
    low, high = point.interval
    latency = tails(cell.records)
    quantiles = "; ".join(
        f"{name} " + " / ".join("-" if (value := latency[key][label]) is None else f"{value * 1e3:.1f}" for label in
                                ("p50", "p90", "p99")) + " ms"
        for name, key in (("TTFT", "ttft_s"), ("TPOT", "tpot_s"), ("gap", "gap_s"))
    )  # fmt: skip
    return (
        f"  targets x{curve.scale:g}: {point.attainment:.0%} ({low:.0%} to {high:.0%}) of {point.requests} met both, "
        f"TTFT {point.ttft_met:.0%}, TPOT {point.tpot_met:.0%}, fluid {point.fluid:.0%}; {quantiles}"
    )


def draw(curves: Sequence[Curve], path: Path) -> None:
    """A PNG: one plot for each workload and scale, attainment against rate, with binomial intervals."""
    plots = list(dict.fromkeys((curve.workload, curve.scale) for curve in curves if curve.points))
    if not plots:
        return
    columns = len(dict.fromkeys(scale for _, scale in plots))
    rows = -(-len(plots) // columns)
    with drawing_style():
        figure = new_figure(4.5 * columns, 2.9 * rows)
        for number, (workload, scale) in enumerate(plots):
            axes = figure.add_subplot(rows, columns, number + 1)
            shown = [curve for curve in curves if (curve.workload, curve.scale) == (workload, scale)]
            for curve in shown:
                _draw_curve(axes, curve)
            targets = shown[0].targets
            axes.set_title(f"({workload}) TTFT {targets.ttft_s * 1e3:.0f} ms, TPOT {targets.tpot_s * 1e3:.1f} ms")
            for level in LEVELS:
                axes.axhline(level, color=light("soft"), linewidth=0.8, linestyle=":")
            axes.set_xlim(left=0)
            axes.set_ylim(0, 1.04)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            axes.set_xlabel("requests per second")
            axes.set_ylabel("meet both targets")
            axes.legend()
        FigureCanvasAgg(figure)
        figure.savefig(path, dpi=130)


def _draw_curve(axes: Axes, curve: Curve) -> None:
    rates = [point.rate for point in curve.points]
    shares = [point.attainment for point in curve.points]
    errors = [
        [share - point.interval[0] for share, point in zip(shares, curve.points, strict=True)],
        [point.interval[1] - share for share, point in zip(shares, curve.points, strict=True)],
    ]
    colour = light(_COLOURS.get(curve.system, "idle"))
    axes.errorbar(rates, shares, errors, color=colour, marker="o", markersize=3.5, capsize=2, label=curve.system)
