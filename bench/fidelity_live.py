"""How far the simulator is from a live cluster on this machine; writes a section of docs/fidelity.md.

One prefill and one decode worker with a thread each serve a random checkpoint that is large enough for steps, not the
request path, to take the time. At eight rates of two workloads, `bench.load` loads the cluster, and the simulator gets
the same requests at the same times.
It is told what `tandem profile` measures of that checkpoint: the engine's steps once, what
serving adds to them before each workload and a bit more after each run, all of it together. The machine must keep its
pace (`bench.fidelity_runs`).
Rates are shares of what the prefill worker can take by its calibration, targets are multiples of its steps: the curves
go from everything met to little met on any machine.

Needs a machine with at least two cores and nothing else on them. What was measured stays in --folder: an interrupted
run goes on where it stopped, and --fresh begins anew.

    python -m bench.fidelity_live                        everything, some 45 minutes
    python -m bench.fidelity_live --seconds 10 --repetitions 1 --folder /tmp/quick --no-write       to see that it works
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
from typing import Any

import numpy as np
import yaml

from bench.calibrate import calibrate
from bench.fidelity_page import write_section
from bench.fidelity_runs import Run, measure
from bench.fidelity_table import TITLE, Comparison, Figures, section_text
from bench.pace import pace_in, with_pace
from bench.processes import BenchError
from bench.serving_answers import Answers
from bench.serving_fit import with_serving
from tandem.core.config import DecodeSection, EngineSection, PrefillSection
from tandem.core.config_file import dump_config, load_config
from tandem.core.cost_model import StepLoad
from tandem.core.errors import TandemError
from tandem.core.slo import SloClass
from tandem.core.slo_file import SloFile, WorkloadSection
from tandem.models.random_checkpoint import CheckpointShape, write_random_checkpoint
from tandem.placement.costs.calibration import CalibratedCost, Calibration, load_calibration
from tandem.placement.evaluation.attainment import evaluate
from tandem.placement.evaluation.summary import parts_of
from tandem.placement.simulator import simulate
from tandem.placement.simulator.deployment import Deployment, InstanceSpec
from tandem.placement.simulator.result import SimulationResult
from tandem.placement.workload.requests import RequestStream
from tandem.placement.workload.streams import make_stream

_SHAPE = CheckpointShape(
    hidden_size=640,
    intermediate_size=1728,
    num_hidden_layers=10,
    num_attention_heads=10,
    num_key_value_heads=5,
    head_dim=64,
    vocab_size=8192,
)
_ENGINE = EngineSection(threads=1, kv_memory=512 << 20)
_LOADS = (0.3, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95, 1.05)  # of the prompts that the prefill worker can compute
_WORKLOADS: Mapping[str, Mapping[str, object]] = {
    "ShareGPT (DistServe's lengths), a fifth": {"dataset": "distserve_sharegpt", "length_scale": 0.2},
    "Azure 2023 conversations, an eighth": {"dataset": "azure_conv", "length_scale": 0.125},
}
_TTFT_STEPS, _TPOT_STEPS = 4.0, 1.35  # targets: of a mean prompt's step; of a step of four sequences
_SETTLING_ROUNDS = 4


def simulate_one_and_one(calibration: Calibration, stream: RequestStream) -> SimulationResult:
    """How busy each worker is slows the other one down, and follows from the simulation: it is repeated with the shares
    that it has found, until they agree."""
    busy = {"prefill": 0.5, "decode": 0.5}
    for _ in range(_SETTLING_ROUNDS):
        result = simulate(deployment_of_one_and_one(calibration, busy), stream)
        busy = {use.role: min(1.0, use.busy_s / result.end_s) for use in result.instances}
    return result


def deployment_of_one_and_one(calibration: Calibration, busy: Mapping[str, float]) -> Deployment:
    """What `Launcher` starts with `_ENGINE`, as the simulator knows it. `busy`: each role's share of the time."""
    block_size = _ENGINE.block_size
    num_blocks = int(calibration.kv_memory_bytes // (calibration.kv_bytes_per_token * block_size))
    prefill, decode = PrefillSection(), DecodeSection()
    pool: dict[str, Any] = {"num_blocks": num_blocks, "block_size": block_size}
    beside = {
        role: CalibratedCost(calibration.terms, calibration.serving, neighbour_busy=share)
        for role, share in busy.items()
    }
    serving = calibration.serving
    return Deployment(
        instances=(
            InstanceSpec(
                "prefill-0",
                "prefill",
                beside["decode"],
                **pool,
                max_batch_tokens=prefill.max_batch_tokens,
                wake_share=busy["decode"] * serving.prefill_wake,
            ),
            InstanceSpec(
                "decode-0",
                "decode",
                beside["prefill"],
                **pool,
                max_batch=decode.max_batch,
                open_s=serving.decode_open_s,
            ),
        ),
        network=calibration.network_spec(neighbour_busy=busy["prefill"]),
        router=calibration.router_spec(),
    )


def plan_runs(folder: Path, model: Path, number: int, args: argparse.Namespace, calibration: Calibration) -> list[Run]:
    """All runs of a workload; repetitions lie apart in time. Targets and rates, by the first calibration, are kept in
    the folder."""
    name, workload = list(_WORKLOADS.items())[number]
    path = folder / f"slo-{number}.yaml"
    if not path.exists():
        path.write_text(_slo_text(model, workload, calibration, args.seed))
    slo = load_config(path, SloFile)
    assert isinstance(slo.workload.rate, float), "the rate that prefill can take"
    runs = []
    for repetition in range(args.repetitions):
        for share in args.loads:
            rate = round(share * slo.workload.rate, 2)
            record = folder / f"run-{number}-{share:g}-{repetition}.json"
            count = max(20, round(rate * args.seconds))
            runs.append(Run(name, calibration, path, slo, share, rate, count, repetition, record))
    return runs


def measure_all(folder: Path, model: Path, args: argparse.Namespace) -> list[Run]:
    """Those runs that are not there yet; returns all, with what was measured beside any of them as their calibration.

    Raises BenchError or a TandemError."""
    engine, answers = _engine_calibration(folder / "engine.yaml", model), Answers()
    settings = _ENGINE.model_dump(mode="json")
    plans = [partial(plan_runs, folder, model, number, args) for number in range(len(_WORKLOADS))]
    for number, plan in enumerate(plans):
        answers.add(measure(model, settings, engine, folder / f"serving-{number}.json", plan, args.seed))
    calibration = with_serving(engine, answers)
    (folder / "calibration.yaml").write_text(dump_config(calibration))
    return [run for plan in plans for run in plan(calibration)]


def _engine_calibration(path: Path, model: Path) -> Calibration:
    """Of the engine by itself, which keeps its pace."""
    if not path.exists():
        print("profile the engine", file=sys.stderr, flush=True)
        path.write_text(dump_config(calibrate(model, _ENGINE, today=datetime.now(UTC).date(), serving_s=0.0)))
    return load_calibration(path)


def _slo_text(model: Path, workload: Mapping[str, object], calibration: Calibration, seed: int) -> str:
    """An SLO file for this machine; its rate is what the prefill worker can take."""
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


def compare(runs: Sequence[Run], seed: int) -> Iterator[Comparison]:
    """One for each workload and rate, over its repetitions. Those in doubt count only where all are."""
    for run in runs:
        if run.repetition > 0:
            continue
        repeated = [other for other in runs if (other.workload, other.share) == (run.workload, run.share)]
        stream, sound, doubtful = run.stream(seed), list[Run](), list[Run]()
        for other in repeated:
            is_sound = other.told()["generator"]["fault"] is None and other.is_steady(other.around())
            (sound if is_sound else doubtful).append(other)
        counted = sound or doubtful
        paces = tuple(pace_in(one.answers(), run.calibration) for one in counted)
        at_pace = (simulate_one_and_one(with_pace(run.calibration, pace), stream) for pace in paces)
        yield Comparison(
            workload=run.workload,
            share=run.share,
            rate=round(stream.rate, 2),
            requests=len(stream),
            ttft_target_s=run.slo.slo[0].ttft_s,
            tpot_target_s=run.slo.slo[0].tpot_s,
            simulated=_figures_of(simulate_one_and_one(run.calibration, stream), run),
            live=tuple(_figures_of(one.seen(stream), run) for one in counted),
            paces=paces,
            at_pace=tuple(_figures_of(one, run) for one in at_pace),
            left_out=len(doubtful) if sound else 0,
            is_in_doubt=not sound,
        )


def _figures_of(result: SimulationResult, run: Run) -> Figures:
    judged = evaluate(result, run.slo.slo, transient=True).classes[0]
    return Figures(
        attainment=judged.attainment,
        ttft_attainment=judged.ttft_attainment,
        tpot_attainment=judged.tpot_attainment,
        ttft_s=judged.ttft_s.mean,
        tpot_s=judged.tpot_s.mean,
        parts_s={name: float(values.mean()) for name, values in parts_of(result).items()},
    )


def _pace_note(runs: Sequence[Run]) -> str:
    around = [run.around() for run in runs]
    paces = sorted(value for one in around for pace in (one.before, one.after) for value in asdict(pace).values())
    return (
        f"Around the runs, steps took {paces[0]:.2f} to {paces[-1]:.2f} times what the first calibration says (median"
        f" {paces[len(paces) // 2]:.2f})."
    )


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fidelity_live", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "tandem-fidelity", metavar="DIR",
                        help="for the checkpoint, the calibration and the records (default: %(default)s)")  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--loads", type=_shares, default=_LOADS, metavar="X,X,..",
                        help="rates, as shares of what prefill can take (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=35.0, help="of arrivals in a run (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=2, help="of each run (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and arrivals (default: %(default)s)")
    parser.add_argument("--note", default="", help="a sentence for the section, on how it was measured")
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
            write_random_checkpoint(model, _SHAPE, dtype="bfloat16")
        runs = measure_all(folder, model, args)
        comparisons = list(compare(runs, args.seed))
    except (BenchError, TandemError) as error:
        print(error, file=sys.stderr)
        return 1
    section = section_text(comparisons, runs[0].calibration, " ".join((_pace_note(runs), args.note)).strip())
    print(section)
    (folder / "comparisons.json").write_text(json.dumps([asdict(one) for one in comparisons], indent=1))
    if not args.no_write:
        write_section(TITLE, section)
    return 0


if __name__ == "__main__":
    sys.exit(main())
