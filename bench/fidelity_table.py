"""The section "Our own cluster" of docs/fidelity.md: live runs beside simulated ones, and how far apart they are."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from bench.pace import Pace
from tandem.placement.costs.calibration import Calibration

TITLE = "Our own cluster"
_ATTAINMENT_AIM = 0.03
_LATENCY_AIM = 0.08


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one run, all its requests: shares that met both targets, or one; means in seconds, parts as in timelines."""

    attainment: float
    ttft_attainment: float
    tpot_attainment: float
    ttft_s: float
    tpot_s: float
    parts_s: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One workload at one rate. `live` has one entry per repetition, without `left_out` ones that are in doubt: the
    load generator says so, or the machine did not keep its pace. `is_in_doubt`: all of them are, and none left out.
    `paces` are the live runs' own, and `at_pace` what is simulated for each if that is known."""

    workload: str
    share: float
    rate: float
    requests: int
    ttft_target_s: float
    tpot_target_s: float
    simulated: Figures
    live: tuple[Figures, ...]
    paces: tuple[Pace, ...]
    at_pace: tuple[Figures, ...]
    left_out: int = 0
    is_in_doubt: bool = False

    def live_mean(self, name: str) -> float:
        return fmean(getattr(one, name) for one in self.live)

    def live_spread(self, name: str) -> float:
        """Largest minus smallest."""
        values = [getattr(one, name) for one in self.live]
        return float(max(values) - min(values))

    @property
    def attainment_error(self) -> float:
        """Simulated minus live, in shares."""
        return self.simulated.attainment - self.live_mean("attainment")

    def latency_error(self, name: str) -> float:
        """Simulated against live, relative."""
        return float(getattr(self.simulated, name)) / self.live_mean(name) - 1

    def knowing_the_pace(self) -> "Comparison":
        """The same with what is simulated at each run's own pace, on average."""
        return replace(self, simulated=_mean(self.at_pace))

    @property
    def is_met(self) -> bool:
        errors = [abs(self.latency_error(name)) for name in ("ttft_s", "tpot_s")]
        return abs(self.attainment_error) <= _ATTAINMENT_AIM and max(errors) <= _LATENCY_AIM


def section_text(comparisons: Sequence[Comparison], calibration: Calibration, note: str = "") -> str:
    """What stands under `TITLE`. `calibration`: one of those used. `note`: what a reader must know of this
    measurement."""
    lines = [*_preamble(comparisons, calibration)]
    lines += ["", note] if note else []
    for workload in dict.fromkeys(one.workload for one in comparisons):
        rows = [one for one in comparisons if one.workload == workload]
        first = rows[0]
        lines += ["", f"### {workload}", ""]
        lines.append(f"Targets: TTFT {first.ttft_target_s:g} s, TPOT {1e3 * first.tpot_target_s:g} ms.")
        lines += ["", *_table(rows), "", "Where the time goes, mean milliseconds, live / simulated:", ""]
        lines += _parts_table(rows)
        lines += ["", "At the pace of each run's own steps, over the calibration's:", "", *_pace_table(rows)]
    return "\n".join(lines) + "\n"


def _mean(figures: Sequence[Figures]) -> Figures:
    names = dict.fromkeys(name for one in figures for name in one.parts_s)
    return Figures(
        attainment=fmean(one.attainment for one in figures),
        ttft_attainment=fmean(one.ttft_attainment for one in figures),
        tpot_attainment=fmean(one.tpot_attainment for one in figures),
        ttft_s=fmean(one.ttft_s for one in figures),
        tpot_s=fmean(one.tpot_s for one in figures),
        parts_s={name: fmean(one.parts_s.get(name, 0.0) for one in figures) for name in names},
    )


def _preamble(comparisons: Sequence[Comparison], calibration: Calibration) -> Iterator[str]:
    yield (
        f"`python -m bench.fidelity_live`, {calibration.measured_on}: {calibration.device}, {calibration.cores} cores,"
        f" {calibration.dtype}; one prefill and one decode worker, {calibration.threads} thread each."
        f" {len(comparisons[0].live) + comparisons[0].left_out} live run(s) per row (± half their range),"
        f" {sum(one.left_out for one in comparisons)} of all left out, because the load generator was late or the"
        f" machine did not keep its pace; every request counts."
    )
    yield ""
    yield (
        f"Aim: attainment within 3 points, mean TTFT and TPOT within 8 %. Met in {_met(comparisons)}. The simulator"
        f" knows only what `tandem profile` measures: the engine's steps (error on those that were not fitted:"
        f" {calibration.error.median:.1%}), and what serving adds to them, before and between the runs. A row with !"
        f" has only runs in doubt."
    )
    yield ""
    paces = sorted(pace for one in comparisons for each in one.paces for pace in (each.prefill, each.decode))
    yield (
        f"From one run to the next the same steps take longer or shorter: {paces[0]:.2f} to {paces[-1]:.2f} times what"
        f" the calibration says. If the simulator is told this of each run, two numbers, one for each phase, it meets"
        f" the aim in {_met([one.knowing_the_pace() for one in comparisons])}: the rest is the machine's pace,"
        f" which is another one in a run than beside it, and changes within a run, too."
    )


def _met(comparisons: Sequence[Comparison]) -> str:
    met = sum(one.is_met for one in comparisons)
    attainment = max(abs(one.attainment_error) for one in comparisons)
    ttft, tpot = (max(abs(one.latency_error(name)) for one in comparisons) for name in ("ttft_s", "tpot_s"))
    return (
        f"{met} of {len(comparisons)} rows; largest differences {100 * attainment:.1f} points, TTFT {ttft:.1%},"
        f" TPOT {tpot:.1%}"
    )


def _table(rows: Sequence[Comparison]) -> Iterator[str]:
    yield (
        "| req/s | requests | attainment live | simulated | points | TTFT live (ms) | simulated | % |"
        " TPOT live (ms) | simulated | % | aim |"
    )
    yield "|---:" * 11 + "|---|"
    for one in rows:
        latencies = []
        for name in ("ttft_s", "tpot_s"):
            live, spread = 1e3 * one.live_mean(name), 500 * one.live_spread(name)
            simulated = 1e3 * getattr(one.simulated, name)
            live_text = f"{live:.1f} ± {spread:.1f}" if len(one.live) > 1 else f"{live:.1f}"
            latencies.append(f"{live_text} | {simulated:.1f} | {100 * one.latency_error(name):+.1f}")
        live, spread = 100 * one.live_mean("attainment"), 50 * one.live_spread("attainment")
        live_text = f"{live:.1f} ± {spread:.1f}" if len(one.live) > 1 else f"{live:.1f}"
        yield (
            f"| {one.rate:g}{' !' if one.is_in_doubt else ''} | {one.requests} | {live_text} %"
            f" | {100 * one.simulated.attainment:.1f} % | {100 * one.attainment_error:+.1f} | {latencies[0]}"
            f" | {latencies[1]} | {'met' if one.is_met else 'missed'} |"
        )


def _parts_table(rows: Sequence[Comparison]) -> Iterator[str]:
    names = list(dict.fromkeys(name for one in rows for name in one.live[0].parts_s))
    yield "| req/s | " + " | ".join(name.removesuffix("_s").replace("_", " ") for name in names) + " |"
    yield "|---:" * (len(names) + 1) + "|"
    for one in rows:
        live, simulated = _mean(one.live).parts_s, one.simulated.parts_s
        cells = [f"{1e3 * live.get(name, 0.0):.1f} / {1e3 * simulated.get(name, 0.0):.1f}" for name in names]
        yield f"| {one.rate:g} | " + " | ".join(cells) + " |"


def _pace_table(rows: Sequence[Comparison]) -> Iterator[str]:
    yield "| req/s | prefill's steps | decode's | points | TTFT % | TPOT % | aim |"
    yield "|---:" * 6 + "|---|"
    for one in rows:
        told = one.knowing_the_pace()
        paces = [_range([getattr(pace, phase) for pace in one.paces]) for phase in ("prefill", "decode")]
        yield (
            f"| {one.rate:g} | {' | '.join(paces)} | {100 * told.attainment_error:+.1f}"
            f" | {100 * told.latency_error('ttft_s'):+.1f} | {100 * told.latency_error('tpot_s'):+.1f}"
            f" | {'met' if told.is_met else 'missed'} |"
        )


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"
