"""`tandem profile`: measure the engine on this machine, for the planner and the simulator."""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

from bench.processes import BenchError
from tandem.cli.common import BUILT_IN_MODEL, say
from tandem.cli.progress import Progress
from tandem.core.config import EngineSection, parse_bytes
from tandem.core.config_file import dump_config
from tandem.core.errors import ConfigError, UnavailableError
from tandem.deploy.machine import usable_cores
from tandem.deploy.model_folder import check_model_folder
from tandem.placement.costs.calibration import Calibration
from tandem.placement.costs.serving import ServedStep

HELP = "measure a model on this machine, for plans and simulations"
DESCRIPTION = """\
Measure how long the engine's steps take on this machine, prompts and decode, alone and as a prefill worker and a
decode worker take them side by side, and what the request path adds. The calibration file that it writes goes into an
SLO file (cluster.nodes.calibration); what was held out of the fit tells its error. It takes less than two minutes;
leave the machine alone meanwhile."""
EPILOG = """\
examples:
  tandem profile                                      the built-in model, into calibration.yaml
  tandem profile ~/models/Qwen3-0.6B -o qwen.yaml
  tandem profile --threads 4 --kv-memory 2GiB         as the instances will be served
"""
_ENGINE_SHARE = 0.6  # of the time
_UNSEEN_BYTES_PER_S = 1e11  # from here on a prompt's KV takes next to nothing, beside what any takes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", type=Path, default=BUILT_IN_MODEL, help="a checkpoint's folder")
    parser.add_argument("-o", "--output", type=Path, default=Path("calibration.yaml"), help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="CPU threads of an instance (default: half of the cores)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: %(default)s)")
    parser.add_argument("--kv-memory", default="512MiB", help="KV pool of an instance (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=75.0, help="to measure for, loading not counted (default: %(default)s)"
    )
    parser.add_argument(
        "--no-cluster", action="store_true", help="only the engine: no serving factors, no request path"
    )


def run(args: argparse.Namespace) -> int:
    from bench.calibrate import calibrate  # torch: seconds that the other commands need not wait

    check_model_folder(args.model)
    if args.seconds <= 0:
        raise ConfigError("--seconds must be more than 0")
    if not args.output.absolute().parent.is_dir():
        raise ConfigError(f"there is no folder {args.output.absolute().parent} to write {args.output.name} into")
    with Progress(sys.stderr) as progress:
        try:
            calibration = calibrate(
                args.model,
                _engine_section(args),
                today=datetime.now(UTC).date(),
                engine_s=args.seconds if args.no_cluster else _ENGINE_SHARE * args.seconds,
                serving_s=0.0 if args.no_cluster else (1 - _ENGINE_SHARE) * args.seconds,
                progress=progress,
            )
        except BenchError as error:
            raise UnavailableError(f"the cluster to be measured failed: {error}") from error
    try:
        args.output.write_text(dump_config(calibration), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{args.output} cannot be written ({error.strerror})") from error
    say(as_text(calibration))
    say(f"\nwritten to {args.output}")
    return 0


def as_text(calibration: Calibration) -> str:
    """What was found, for a person."""
    error, terms, serving = calibration.error, calibration.terms, calibration.serving
    lines = [
        f"{calibration.model} in {calibration.dtype} on {calibration.device}, {calibration.threads} thread(s) each",
        f"  steps         {len(calibration.measurements)} loads measured; error on those that were not fitted:"
        f" {error.median:.1%} (median), {error.worst:.1%} (worst)",
        f"  prompts       {_tokens_per_s(calibration, 256):.0f} tokens/s at 256 tokens",
        f"  decode        {1e3 * terms.linear[0][1]:.1f} ms a step with little to read, one sequence",
        f"  side by side  {_added('prompts', serving.prefill_alone, serving.prefill_contended)};"
        f" {_added('decode', serving.decode_alone, serving.decode_contended)},"
        f" {1e3 * serving.request_admission_cost_s:.1f} ms more for each request that comes",
    ]
    if (request_path := calibration.request_path) is not None:
        per_byte = f" and 1 s per {request_path.transfer_bytes_per_s / 1e9:.2f} GB"
        lines.append(
            f"  request_path          {1e3 * request_path.admission_s:.1f} ms until a worker has a request,"
            f" {1e3 * request_path.transfer_alone_s:.1f} to {1e3 * request_path.transfer_contended_s:.1f} ms for its KV"
            + (per_byte if request_path.transfer_bytes_per_s < _UNSEEN_BYTES_PER_S else ", however much that is")
        )
    return "\n".join(lines)


def _added(name: str, alone: ServedStep, beside: ServedStep) -> str:
    """What a step takes in a worker, of what it takes the engine by itself."""

    def text(step: ServedStep) -> str:
        return f"{step.factor:.2f} x + {1e3 * step.constant_s:.1f} ms"

    return f"{name} {text(alone)} alone, {text(beside)} beside"


def _tokens_per_s(calibration: Calibration, tokens: int) -> float:
    nearest = min(
        (one for one in calibration.measurements if one.prefill_tokens and not one.decode_sequences),
        key=lambda one: abs(one.prefill_tokens - tokens),
    )
    return nearest.prefill_tokens / nearest.seconds


def _engine_section(args: argparse.Namespace) -> EngineSection:
    kv_memory = parse_bytes(args.kv_memory)
    if not isinstance(kv_memory, int) or kv_memory <= 0:
        raise ConfigError(f"--kv-memory {args.kv_memory}: write a number of bytes, e.g. 512MiB")
    threads = max(1, usable_cores() // 2) if args.threads is None else args.threads
    if threads < 1:
        raise ConfigError(f"--threads must be at least 1, not {threads}")
    return EngineSection(dtype=args.dtype, device=args.device, threads=threads, kv_memory=kv_memory)
