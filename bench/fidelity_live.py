"""How far the simulator is from a live cluster on this machine; writes a section of docs/fidelity.md.

One prefill and one decode worker with a thread each serve a random checkpoint that is large enough for steps, not the
road, to take the time. For each of two workloads, `tandem profile`'s measurement of that checkpoint, made just before,
is all that the simulator is told: a virtual machine changes its pace within minutes. Then, at eight rates, `bench.load`
loads the cluster, and the simulator gets the same requests at the same times. Rates are shares of what the prefill
worker can take by its calibration, targets are multiples of its steps: the curves go from everything met to little met
on any machine.

Needs a machine with at least two cores and nothing else on them. What was measured stays in --folder: an interrupted
run goes on where it stopped, and --fresh begins anew.

    python -m bench.fidelity_live                        everything, some 23 minutes
    python -m bench.fidelity_live --seconds 10 --repetitions 1 --folder /tmp/quick --no-write       to see that it works
"""

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from bench.calibrate import calibrate
from bench.fidelity_page import write_section
from bench.fidelity_table import TITLE, Comparison, Figures, section_text
from bench.load import make_streams
from bench.load_result import LoadRecord, as_simulation
from bench.processes import BenchError, Launcher
from core.config import DecodeSection, EngineSection, PrefillSection
from core.config_file import dump_config, load_config
from core.cost_model import StepLoad
from core.errors import TandemError
from core.slo import SloClass
from core.slo_file import SloFile, WorkloadSection
from models.random_checkpoint import CheckpointShape, write_random_checkpoint
from placement.costs.calibration import CalibratedCost, Calibration, load_calibration
from placement.judging.judgement import judge
from placement.judging.summary import parts_of
from placement.simulator import simulate
from placement.simulator.deployment import Deployment, InstanceSpec
from placement.simulator.result import SimulationResult
from placement.workload.requests import RequestStream
from placement.workload.streams import make_stream

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


@dataclass(frozen=True, slots=True)
class Run:
    """One run to be made: `share` of what prefill can take. `path` is where its records lie, `calibration` was measured
    before it."""

    workload: str
    calibration: Calibration
    slo_path: Path
    slo: SloFile
    share: float
    rate: float
    count: int
    repetition: int
    path: Path

    def stream(self, seed: int) -> RequestStream:
        """The same for every repetition."""
        return make_streams(self.slo, None, (self.rate,), self.count, seed)[0][1]


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
    return Deployment(
        instances=(
            InstanceSpec("prefill-0", "prefill", beside["decode"], **pool, max_batch_tokens=prefill.max_batch_tokens),
            InstanceSpec("decode-0", "decode", beside["prefill"], **pool, max_batch=decode.max_batch),
        ),
        network=calibration.network_spec(),
        router=calibration.router_spec(),
    )


def plan_runs(folder: Path, model: Path, number: int, args: argparse.Namespace) -> list[Run]:
    """All runs of a workload; repetitions lie apart in time. The machine is measured, and targets and rates are chosen,
    once for a folder."""
    name, workload = list(_WORKLOADS.items())[number]
    calibration = _calibration(folder / f"calibration-{number}.yaml", model)
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


def _calibration(path: Path, model: Path) -> Calibration:
    if not path.exists():
        print("profile the model", file=sys.stderr, flush=True)
        path.write_text(dump_config(calibrate(model, _ENGINE, today=datetime.now(UTC).date())))
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


async def measure(model: Path, runs: Sequence[Run], seed: int) -> None:
    """Those runs whose records are not there yet, on one cluster. Raises BenchError."""
    missing = [run for run in runs if not run.path.exists()]
    if not missing:
        return
    async with Launcher(model) as launcher:
        router = await launcher.router()
        await launcher.workers(router, _ENGINE.model_dump(mode="json"))
        url = f"http://{router.http}"
        await _load(url, missing[0], seed, requests=30, output=model.parent / "warm-up.json")
        for run in tqdm(missing, desc="live runs", unit="run", disable=None):
            await _load(url, run, seed, requests=run.count, output=run.path)


async def _load(url: str, run: Run, seed: int, *, requests: int, output: Path) -> None:
    """In a process of its own, as a user would; its file appears only when it is whole."""
    partial = output.with_suffix(".partial")
    command = [sys.executable, "-m", "bench.load", "--url", url, "--slo", str(run.slo_path), "--timelines"]
    command += ["--rates", str(run.rate), "--requests", str(requests), "--seed", str(seed), "--json", str(partial)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    said, _ = await process.communicate()
    if process.returncode not in (0, 3):  # 3: marked by the generator, which the table says
        raise BenchError(f"bench.load ended with {process.returncode}: {said.decode()[-400:]}")
    partial.rename(output)


def compare(runs: Sequence[Run], seed: int) -> Iterator[Comparison]:
    """One for each workload and rate, over its repetitions."""
    for run in runs:
        if run.repetition > 0:
            continue
        repeated = [other for other in runs if (other.workload, other.share) == (run.workload, run.share)]
        stream, live, faults = run.stream(seed), [], 0
        for other in repeated:
            told = json.loads(other.path.read_text())["runs"][0]
            faults += told["generator"]["fault"] is not None
            records = tuple(LoadRecord(**one) for one in told["requests"])
            live.append(_figures_of(as_simulation(stream, records, told["duration_s"]), run))
        yield Comparison(
            workload=run.workload,
            share=run.share,
            rate=round(stream.rate, 2),
            requests=len(stream),
            ttft_target_s=run.slo.slo[0].ttft_s,
            tpot_target_s=run.slo.slo[0].tpot_s,
            simulated=_figures_of(simulate_one_and_one(run.calibration, stream), run),
            live=tuple(live),
            marked=faults,
        )


def _figures_of(result: SimulationResult, run: Run) -> Figures:
    judged = judge(result, run.slo.slo, transient=True).classes[0]
    return Figures(
        attainment=judged.attainment,
        ttft_attainment=judged.ttft_attainment,
        tpot_attainment=judged.tpot_attainment,
        ttft_s=judged.ttft_s.mean,
        tpot_s=judged.tpot_s.mean,
        parts_s={name: float(values.mean()) for name, values in parts_of(result).items()},
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
        for pattern in ("calibration-*.yaml", "slo-*.yaml", "run-*.json"):
            for path in folder.glob(pattern):
                path.unlink()
    model, runs = folder / "model", list[Run]()
    try:
        if not (model / "config.json").exists():
            write_random_checkpoint(model, _SHAPE, dtype="bfloat16")
        for number in range(len(_WORKLOADS)):
            of_workload = plan_runs(folder, model, number, args)
            asyncio.run(measure(model, of_workload, args.seed))
            runs += of_workload
        comparisons = list(compare(runs, args.seed))
    except (BenchError, TandemError) as error:
        print(error, file=sys.stderr)
        return 1
    section = section_text(comparisons, {run.workload: run.calibration for run in runs}, args.note)
    print(section)
    (folder / "comparisons.json").write_text(json.dumps([asdict(one) for one in comparisons], indent=1))
    if not args.no_write:
        write_section(TITLE, section)
    return 0


if __name__ == "__main__":
    sys.exit(main())
