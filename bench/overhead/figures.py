"""Samples of repeated rounds, and the table of their medians and aims."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import median


class Quantity(Enum):
    """A measured quantity: title, unit, and units per second."""

    PER_REQUEST = ("per request", "ms", 1e3)
    PER_TOKEN = ("per token and request", "us", 1e6)

    def __init__(self, title: str, unit: str, per_second: float) -> None:
        self.title = title
        self.unit = unit
        self.per_second = per_second


@dataclass(frozen=True, slots=True)
class OverheadSample:
    """One sample of one round. `subject`: the measured case; `clock`: CPU or wall."""

    subject: str
    num_streams: int
    quantity: Quantity
    clock: str
    seconds: float


@dataclass(frozen=True, slots=True)
class OverheadFigure:
    """The median of a quantity's samples, in its unit. `aim`: the median should be lower."""

    subject: str
    num_streams: int
    quantity: str
    clock: str
    unit: str
    median: float
    least: float
    most: float
    aim: float | None


def _aim(quantity: Quantity, num_streams: int) -> float | None:
    if quantity is Quantity.PER_REQUEST:
        return 3.0
    return 100.0 if num_streams == 32 else None


def figures_of(samples: Sequence[OverheadSample], *, clock_with_aims: str) -> list[OverheadFigure]:
    """One figure for all samples that differ only in their value, in the order of their first appearance."""
    groups: defaultdict[tuple[str, int, Quantity, str], list[float]] = defaultdict(list)
    for sample in samples:
        groups[sample.subject, sample.num_streams, sample.quantity, sample.clock].append(sample.seconds)
    figures = []
    for (subject, num_streams, quantity, clock), seconds in groups.items():
        values = [value * quantity.per_second for value in seconds]
        figures.append(
            OverheadFigure(
                subject=subject,
                num_streams=num_streams,
                quantity=quantity.title,
                clock=clock,
                unit=quantity.unit,
                median=median(values),
                least=min(values),
                most=max(values),
                aim=_aim(quantity, num_streams) if clock == clock_with_aims else None,
            )
        )
    return figures


def figures_table(figures: Sequence[OverheadFigure]) -> str:
    width = max(len(figure.subject) for figure in figures)
    lines = [f"{'':{width}} streams {'':21} clock   median     least      most  aim"]
    for figure in figures:
        values = "".join(f"{value:>8.2f} {figure.unit}"[:11] for value in (figure.median, figure.least, figure.most))
        verdict = ""
        if figure.aim is not None:
            verdict = f"{'met' if figure.median < figure.aim else 'missed'} (< {figure.aim:g} {figure.unit})"
        label = f"{figure.subject:{width}} {figure.num_streams:>7} {figure.quantity:21} {figure.clock:5}"
        lines.append(f"{label}{values}  {verdict}".rstrip())
    return "\n".join(lines)
