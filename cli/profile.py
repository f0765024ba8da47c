"""`tandem profile`: measure the engine on this machine, for the planner and the simulator."""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

from tandem.cli.common import BUILT_IN_MODEL, say
from tandem.cli.progress import Progress
from tandem.core.config import EngineSection, parse_bytes
from tandem.core.config_file import dump_config
from tandem.core.errors import ConfigError
from tandem.deploy.machine import usable_cores
from tandem.deploy.model_folder import check_model_folder
from tandem.placement.costs.calibration import Calibration
from tandem.placement.costs.serving import ServedStep

HELP = "measure a model on this machine, for plans and simulations"
DESCRIPTION = """\
Measure the engine's step times on this machine, for prompts and for decode; then the same steps in a prefill worker
and a decode worker that run at the same time; and the costs of the request path. The result is a calibration file for
an SLO file (cluster.nodes.calibration). Its error is that of measurements held out of the fit. This takes less than two
minutes; run nothing else on the machine meanwhile."""
EPILOG = """\
examples:
  tandem profile                                      the built-in model, into calibration.yaml
  tandem profile ~/models/Qwen3-0.6B -o qwen.yaml
  tandem profile --threads 4 --kv-memory 2GiB         settings of the instances to be served
"""
_ENGINE_SHARE = 0.6  # of the time
_NEGLIGIBLE_BYTES_PER_S = 1e11  # at this rate the size of the KV hardly matters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", type=Path, default=BUILT_IN_MODEL, help="a checkpoint's folder")
    parser.add_argument("-o", "--output", type=Path, default=Path("calibration.yaml"), help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="CPU threads of an instance (default: half of the cores)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: %(default)s)")
    parser.add_argument("--kv-memory", default="512MiB", help="KV pool of an instance (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=75.0, help="time to measure, without loading (default: %(default)s)"
    )
    parser.add_argument(
        "--no-cluster", action="store_true", help="only the engine: no serving factors, no request path"
    )


def run(args: argparse.Namespace) -> int:
    from tandem.profiling.calibrate import calibrate  # imports torch, which takes seconds

    check_model_folder(args.model)
    if args.seconds <= 0:
        raise ConfigError("--seconds must be more than 0")
    if not args.output.absolute().parent.is_dir():
        raise ConfigError(f"there is no folder {args.output.absolute().parent} to write {args.output.name} into")
    with Progress(sys.stderr) as progress:
        calibration = calibrate(
            args.model,
            _engine_section(args),
            today=datetime.now(UTC).date(),
            engine_s=args.seconds if args.no_cluster else _ENGINE_SHARE * args.seconds,
            serving_s=0.0 if args.no_cluster else (1 - _ENGINE_SHARE) * args.seconds,
            progress=progress,
        )
    try:
        args.output.write_text(dump_config(calibration), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{args.output} cannot be written ({error.strerror})") from error
    say(as_text(calibration))
    say(f"\nwritten to {args.output}")
    return 0


def as_text(calibration: Calibration) -> str:
    """The calibration as a few lines for a person."""
    error, terms, serving = calibration.error, calibration.terms, calibration.serving
    lines = [
        f"{calibration.model} in {calibration.dtype} on {calibration.device}, {calibration.threads} thread(s) each",
        f"  steps         {len(calibration.measurements)} loads measured; error on those held out of the fit:"
        f" {error.median:.1%} (median), {error.worst:.1%} (worst)",
        f"  prompts       {_tokens_per_s(calibration, 256):.0f} tokens/s at 256 tokens",
        f"  decode        {1e3 * terms.linear[0][1]:.1f} ms a step for one sequence with a short context",
        f"  in a worker   {_in_worker('prompts', serving.prefill_alone, serving.prefill_contended)};"
        f" {_in_worker('decode', serving.decode_alone, serving.decode_contended)},"
        f" {1e3 * serving.request_admission_cost_s:.1f} ms more for each admitted request",
    ]
    if (request_path := calibration.request_path) is not None:
        per_byte = f" and 1 s per {request_path.transfer_bytes_per_s / 1e9:.2f} GB"
        lines.append(
            f"  request path  {1e3 * request_path.admission_s:.1f} ms until a worker has a request,"
            f" {1e3 * request_path.transfer_alone_s:.1f} to {1e3 * request_path.transfer_contended_s:.1f} ms for its KV"
            + (per_byte if request_path.transfer_bytes_per_s < _NEGLIGIBLE_BYTES_PER_S else " of any size")
        )
    return "\n".join(lines)


def _in_worker(name: str, alone: ServedStep, contended: ServedStep) -> str:
    """A step's time in a worker, from its time x in the engine alone."""

    def text(step: ServedStep) -> str:
        return f"{step.factor:.2f} x + {1e3 * step.constant_s:.1f} ms"

    return f"{name} {text(alone)} alone, {text(contended)} while the other works"


def _tokens_per_s(calibration: Calibration, tokens: int) -> float:
    nearest = min(
        (cell for cell in calibration.measurements if cell.prefill_tokens and not cell.decode_sequences),
        key=lambda cell: abs(cell.prefill_tokens - tokens),
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
