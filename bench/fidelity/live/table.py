"""The section "Our own cluster" of docs/fidelity.md: live and simulated runs, and their differences."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from bench.fidelity.live.drift import StepTimeDrift
from tandem.placement.costs.calibration import Calibration

TITLE = "Our own cluster"
_ATTAINMENT_AIM = 0.03
_LATENCY_AIM = 0.08


@dataclass(frozen=True, slots=True)
class RunFigures:
    """Of all requests of a run: shares that met both targets, or one; means in seconds, parts as in timelines."""

    attainment: float
    ttft_attainment: float
    tpot_attainment: float
    ttft_s: float
    tpot_s: float
    parts_s: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class LiveComparison:
    """One workload at one rate. `live` has one entry per repetition, without `left_out` doubtful ones: the generator
    was late, or the machine's speed changed. `is_doubtful`: all are, and none is left out. `drifts` are those of the
    live runs, and `with_drifts` the simulations with each of them."""

    workload: str
    share: float
    rate: float
    requests: int
    ttft_target_s: float
    tpot_target_s: float
    simulated: RunFigures
    live: tuple[RunFigures, ...]
    drifts: tuple[StepTimeDrift, ...]
    with_drifts: tuple[RunFigures, ...]
    left_out: int = 0
    is_doubtful: bool = False

    def live_mean(self, name: str) -> float:
        return fmean(getattr(run, name) for run in self.live)

    def live_spread(self, name: str) -> float:
        """Largest minus smallest."""
        values = [getattr(run, name) for run in self.live]
        return float(max(values) - min(values))

    @property
    def attainment_error(self) -> float:
        """Simulated minus live, in shares."""
        return self.simulated.attainment - self.live_mean("attainment")

    def latency_error(self, name: str) -> float:
        """Simulated against live, relative."""
        return float(getattr(self.simulated, name)) / self.live_mean(name) - 1

    def knowing_the_drift(self) -> "LiveComparison":
        """With the mean of the simulations that know the drift of each run."""
        return replace(self, simulated=_mean(self.with_drifts))

    @property
    def is_met(self) -> bool:
        errors = [abs(self.latency_error(name)) for name in ("ttft_s", "tpot_s")]
        return abs(self.attainment_error) <= _ATTAINMENT_AIM and max(errors) <= _LATENCY_AIM


def section_text(comparisons: Sequence[LiveComparison], calibration: Calibration, note: str = "") -> str:
    """The text of the section. `calibration`: one of those used. `note`: on this measurement."""
    lines = [*_preamble(comparisons, calibration)]
    lines += ["", note] if note else []
    for workload in dict.fromkeys(comparison.workload for comparison in comparisons):
        rows = [comparison for comparison in comparisons if comparison.workload == workload]
        first = rows[0]
        lines += ["", f"### {workload}", ""]
        lines.append(f"Targets: TTFT {first.ttft_target_s:g} s, TPOT {1e3 * first.tpot_target_s:g} ms.")
        lines += ["", *_table(rows), "", "Where the time goes, mean milliseconds, live / simulated:", ""]
        lines += _parts_table(rows)
        lines += ["", "With the drift of each run's steps from the calibration:", "", *_drift_table(rows)]
    return "\n".join(lines) + "\n"


def _mean(figures: Sequence[RunFigures]) -> RunFigures:
    names = dict.fromkeys(name for run in figures for name in run.parts_s)
    return RunFigures(
        attainment=fmean(run.attainment for run in figures),
        ttft_attainment=fmean(run.ttft_attainment for run in figures),
        tpot_attainment=fmean(run.tpot_attainment for run in figures),
        ttft_s=fmean(run.ttft_s for run in figures),
        tpot_s=fmean(run.tpot_s for run in figures),
        parts_s={name: fmean(run.parts_s.get(name, 0.0) for run in figures) for name in names},
    )


def _preamble(comparisons: Sequence[LiveComparison], calibration: Calibration) -> Iterator[str]:
    yield (
        f"`python -m bench.fidelity.live`, {calibration.measured_on}: {calibration.device}, {calibration.cores} cores,"
        f" {calibration.dtype}; one prefill and one decode worker, {calibration.threads} thread each."
        f" {len(comparisons[0].live) + comparisons[0].left_out} live run(s) per row (± half their range),"
        f" {sum(row.left_out for row in comparisons)} of all left out, because the load generator was late or the"
        f" machine's speed changed; every request counts."
    )
    yield ""
    yield (
        f"Aim: attainment within 3 points, mean TTFT and TPOT within 8 %. Met in {_met(comparisons)}. The simulator"
        f" uses only measurements of `tandem profile`: the engine's steps (error on those held out of the fit:"
        f" {calibration.error.median:.1%}), and serving costs, measured before and between the runs. A row with ! has"
        f" only doubtful runs."
    )
    yield ""
    ratios = sorted(ratio for row in comparisons for drift in row.drifts for ratio in (drift.prefill, drift.decode))
    yield (
        f"The same steps take {ratios[0]:.2f} to {ratios[-1]:.2f} times as long as in the calibration, depending on the"
        f" run. If the simulator knows this drift of each run, one number for each phase, it meets the aim in"
        f" {_met([row.knowing_the_drift() for row in comparisons])}. So most of the difference is the speed of the"
        f" machine, which differs between calibration and run, and also changes within a run."
    )


def _met(comparisons: Sequence[LiveComparison]) -> str:
    met = sum(row.is_met for row in comparisons)
    attainment = max(abs(row.attainment_error) for row in comparisons)
    ttft, tpot = (max(abs(row.latency_error(name)) for row in comparisons) for name in ("ttft_s", "tpot_s"))
    return (
        f"{met} of {len(comparisons)} rows; largest differences {100 * attainment:.1f} points, TTFT {ttft:.1%},"
        f" TPOT {tpot:.1%}"
    )


def _table(rows: Sequence[LiveComparison]) -> Iterator[str]:
    yield (
        "| req/s | requests | attainment live | simulated | points | TTFT live (ms) | simulated | % |"
        " TPOT live (ms) | simulated | % | aim |"
    )
    yield "|---:" * 11 + "|---|"
    for row in rows:
        latencies = []
        for name in ("ttft_s", "tpot_s"):
            live, spread = 1e3 * row.live_mean(name), 500 * row.live_spread(name)
            simulated = 1e3 * getattr(row.simulated, name)
            live_text = f"{live:.1f} ± {spread:.1f}" if len(row.live) > 1 else f"{live:.1f}"
            latencies.append(f"{live_text} | {simulated:.1f} | {100 * row.latency_error(name):+.1f}")
        live, spread = 100 * row.live_mean("attainment"), 50 * row.live_spread("attainment")
        live_text = f"{live:.1f} ± {spread:.1f}" if len(row.live) > 1 else f"{live:.1f}"
        yield (
            f"| {row.rate:g}{' !' if row.is_doubtful else ''} | {row.requests} | {live_text} %"
            f" | {100 * row.simulated.attainment:.1f} % | {100 * row.attainment_error:+.1f} | {latencies[0]}"
            f" | {latencies[1]} | {'met' if row.is_met else 'missed'} |"
        )


def _parts_table(rows: Sequence[LiveComparison]) -> Iterator[str]:
    names = list(dict.fromkeys(name for row in rows for name in row.live[0].parts_s))
    yield "| req/s | " + " | ".join(name.removesuffix("_s").replace("_", " ") for name in names) + " |"
    yield "|---:" * (len(names) + 1) + "|"
    for row in rows:
        live, simulated = _mean(row.live).parts_s, row.simulated.parts_s
        cells = [f"{1e3 * live.get(name, 0.0):.1f} / {1e3 * simulated.get(name, 0.0):.1f}" for name in names]
        yield f"| {row.rate:g} | " + " | ".join(cells) + " |"


def _drift_table(rows: Sequence[LiveComparison]) -> Iterator[str]:
    yield "| req/s | prefill steps, times | decode steps, times | points | TTFT % | TPOT % | aim |"
    yield "|---:" * 6 + "|---|"
    for row in rows:
        knowing = row.knowing_the_drift()
        drifts = [_range([getattr(drift, phase) for drift in row.drifts]) for phase in ("prefill", "decode")]
        yield (
            f"| {row.rate:g} | {' | '.join(drifts)} | {100 * knowing.attainment_error:+.1f}"
            f" | {100 * knowing.latency_error('ttft_s'):+.1f} | {100 * knowing.latency_error('tpot_s'):+.1f}"
            f" | {'met' if knowing.is_met else 'missed'} |"
        )


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"
