"""How far is the simulator from a live cluster on this machine? Writes a section of docs/fidelity.md.

One prefill and one decode worker with a thread each serve a random checkpoint, large enough that steps take most of the
time, not the request path. `bench.load` loads the cluster at eight rates of two workloads, and the simulator gets the
same requests at the same times. Its calibration is measured as by `tandem profile`: the engine's steps once, serving
costs before each workload and again after each run, all together. Runs during which the machine's speed changed are
repeated (see `runs.py`). Rates are shares of the prefill worker's capacity, targets are multiples of its step time, so
that attainment falls from all requests to few on any machine.

Needs a machine with at least two cores and no other load. Measurements stay in --folder: an interrupted measurement
continues where it stopped, and --fresh starts again.

    python -m bench.fidelity.live                        everything, about 45 minutes
    python -m bench.fidelity.live --seconds 10 --repetitions 1 --folder /tmp/quick --no-write       a quick check
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import yaml

from bench.fidelity.live.drift import drift_in_run, with_drift
from bench.fidelity.live.runs import LiveRun, LiveWorkload
from bench.fidelity.live.simulation import CHECKPOINT, ENGINE, simulate_one_and_one
from bench.fidelity.live.table import TITLE, LiveComparison, RunFigures, section_text
from bench.fidelity.page import write_section
from tandem.core.config_file import dump_config, load_config
from tandem.core.cost_model import StepLoad
from tandem.core.errors import TandemError
from tandem.core.slo import SloClass
from tandem.core.slo_file import SloFile, WorkloadSection
from tandem.models.random_checkpoint import write_random_checkpoint
from tandem.placement.costs.calibration import Calibration, load_calibration
from tandem.placement.costs.step_fit import CalibratedCost
from tandem.placement.evaluation.attainment import evaluate
from tandem.placement.evaluation.summary import parts_of
from tandem.placement.simulator.result import SimulationResult
from tandem.placement.workload.streams import make_stream
from tandem.profiling.calibrate import calibrate
from tandem.profiling.serving_fit import with_serving
from tandem.profiling.serving_samples import ServingSamples

_LOADS = (0.3, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95, 1.05)  # shares of the prefill worker's capacity
_WORKLOADS: Mapping[str, Mapping[str, object]] = {
    "ShareGPT (DistServe's lengths), a fifth": {"dataset": "distserve_sharegpt", "length_scale": 0.2},
    "Azure 2023 conversations, an eighth": {"dataset": "azure_conv", "length_scale": 0.125},
}
_TTFT_STEPS = 4.0  # the target, in steps of a mean prompt
_TPOT_STEPS = 1.35  # the target, in decode steps of four sequences


def plan_runs(
    folder: Path, model: Path, number: int, args: argparse.Namespace, calibration: Calibration
) -> list[LiveRun]:
    """All runs of a workload, a repetition after all runs of the previous one. Targets and rates come from the first
    calibration, and are kept in the folder."""
    name, workload = list(_WORKLOADS.items())[number]
    path = folder / f"slo-{number}.yaml"
    if not path.exists():
        path.write_text(_slo_text(model, workload, calibration, args.seed))
    slo = load_config(path, SloFile)
    assert isinstance(slo.workload.rate, float), "the capacity of prefill"
    runs = []
    for repetition in range(args.repetitions):
        for share in args.loads:
            rate = round(share * slo.workload.rate, 2)
            record = folder / f"run-{number}-{share:g}-{repetition}.json"
            count = max(20, round(rate * args.seconds))
            runs.append(LiveRun(name, calibration, path, slo, share, rate, count, repetition, record))
    return runs


def measure_all(folder: Path, model: Path, args: argparse.Namespace) -> list[LiveRun]:
    """Makes the missing runs; returns all runs, with a calibration from the samples around them. Raises TandemError."""
    engine, samples = _engine_calibration(folder / "engine.yaml", model), ServingSamples()
    settings = ENGINE.model_dump(mode="json")
    plans = [partial(plan_runs, folder, model, number, args) for number in range(len(_WORKLOADS))]
    for number, plan in enumerate(plans):
        workload = LiveWorkload(model, settings, engine, folder / f"serving-{number}.json", plan, args.seed)
        samples.add(workload.measure())
    calibration = with_serving(engine, samples)
    (folder / "calibration.yaml").write_text(dump_config(calibration))
    return [run for plan in plans for run in plan(calibration)]


def _engine_calibration(path: Path, model: Path) -> Calibration:
    """Of the engine alone. One measurement serves for all runs."""
    if not path.exists():
        print("profile the engine", file=sys.stderr, flush=True)
        path.write_text(dump_config(calibrate(model, ENGINE, today=datetime.now(UTC).date(), serving_s=0.0)))
    return load_calibration(path)


def _slo_text(model: Path, workload: Mapping[str, object], calibration: Calibration, seed: int) -> str:
    """An SLO file for this machine. Its rate is the capacity of the prefill worker."""
    cost = CalibratedCost(calibration.terms, calibration.serving)
    section = WorkloadSection.model_validate(workload)
    sample = make_stream(section, (SloClass(ttft_s=1.0, tpot_s=1.0),), count=2000, rate=1.0, seed=seed)
    prompt_s = float(np.mean([cost.step(StepLoad.of_prompts(n)).total_s for n in sample.prompt_tokens.tolist()]))
    decode_s = cost.step(StepLoad.of_decode(4, 4 * int(sample.prompt_tokens.mean()))).total_s
    targets = {"ttft_s": round(_TTFT_STEPS * prompt_s, 2), "tpot_s": round(_TPOT_STEPS * decode_s, 4)}
    return yaml.safe_dump(
        {
            "model": str(model),
            "cluster": {"nodes": [{"device": "cpu", "devices": 2}]},
            "slo": [targets],
            "workload": {**workload, "rate": round(1.0 / prompt_s, 2)},
        }
    )


def compare(runs: Sequence[LiveRun], seed: int) -> Iterator[LiveComparison]:
    """One for each workload and rate, over its repetitions. Doubtful repetitions count only if all are doubtful."""
    for run in runs:
        if run.repetition > 0:
            continue
        repeated = [other for other in runs if (other.workload, other.share) == (run.workload, run.share)]
        stream, sound, doubtful = run.stream(seed), list[LiveRun](), list[LiveRun]()
        for other in repeated:
            is_sound = other.read_report()["generator"]["fault"] is None and other.is_steady(other.read_check())
            (sound if is_sound else doubtful).append(other)
        counted = sound or doubtful
        drifts = tuple(drift_in_run(repetition.samples(), run.calibration) for repetition in counted)
        with_drifts = (simulate_one_and_one(with_drift(run.calibration, drift), stream) for drift in drifts)
        yield LiveComparison(
            workload=run.workload,
            share=run.share,
            rate=round(stream.rate, 2),
            requests=len(stream),
            ttft_target_s=run.slo.slo[0].ttft_s,
            tpot_target_s=run.slo.slo[0].tpot_s,
            simulated=_figures_of(simulate_one_and_one(run.calibration, stream), run),
            live=tuple(_figures_of(repetition.as_simulation(stream), run) for repetition in counted),
            drifts=drifts,
            with_drifts=tuple(_figures_of(result, run) for result in with_drifts),
            left_out=len(doubtful) if sound else 0,
            is_doubtful=not sound,
        )


def _figures_of(result: SimulationResult, run: LiveRun) -> RunFigures:
    judged = evaluate(result, run.slo.slo, transient=True).classes[0]
    return RunFigures(
        attainment=judged.attainment,
        ttft_attainment=judged.ttft_attainment,
        tpot_attainment=judged.tpot_attainment,
        ttft_s=judged.ttft_s.mean,
        tpot_s=judged.tpot_s.mean,
        parts_s={name: float(values.mean()) for name, values in parts_of(result).items()},
    )


def _drift_note(runs: Sequence[LiveRun]) -> str:
    checks = [run.read_check() for run in runs]
    ratios = sorted(
        value for check in checks for drift in (check.before, check.after) for value in asdict(drift).values()
    )
    return (
        f"Around the runs, steps took {ratios[0]:.2f} to {ratios[-1]:.2f} times as long as in the first calibration"
        f" (median {ratios[len(ratios) // 2]:.2f})."
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fidelity.live", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "tandem-fidelity", metavar="DIR",
                        help="for the checkpoint, the calibration and the records (default: %(default)s)")  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--loads", type=_shares, default=_LOADS, metavar="X,X,..",
                        help="rates, as shares of prefill's capacity (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=35.0, help="of arrivals in a run (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=2, help="of each run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and arrivals (default: %(default)s)")
    parser.add_argument("--note", default="", help="a sentence for the section, on this measurement")
    parser.add_argument("--no-write", action="store_true", help="print the section, leave docs/fidelity.md alone")
    return parser.parse_args(argv)


def _shares(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    folder: Path = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    if args.fresh:
        for pattern in ("engine.yaml", "serving-*", "calibration.yaml", "slo-*.yaml", "run-*"):
            for path in folder.glob(pattern):
                path.unlink()
    model = folder / "model"
    try:
        if not (model / "config.json").exists():
            write_random_checkpoint(model, CHECKPOINT, dtype="bfloat16")
        runs = measure_all(folder, model, args)
        comparisons = list(compare(runs, args.seed))
    except TandemError as error:
        print(error, file=sys.stderr)
        return 1
    section = section_text(comparisons, runs[0].calibration, " ".join((_drift_note(runs), args.note)).strip())
    print(section)
    (folder / "comparisons.json").write_text(json.dumps([asdict(comparison) for comparison in comparisons], indent=1))
    if not args.no_write:
        write_section(TITLE, section)
    return 0


if __name__ == "__main__":
    sys.exit(main())
