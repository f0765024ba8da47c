"""`tandem profile`: measure the engine on this machine, for the planner and the simulator."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

from tandem.cli.common import BUILT_IN_MODEL, writing
from tandem.cli.output import print_error, print_line, show_progress
from tandem.core.byte_size import parse_bytes
from tandem.core.config_file import dump_config
from tandem.core.errors import ConfigError
from tandem.core.instance_section import EngineSection
from tandem.deploy.machine import usable_cores
from tandem.deploy.model_folder import check_model_folder
from tandem.placement.costs.calibration import Calibration
from tandem.placement.costs.serving import ServedStep

EPILOG = """\
examples:
  tandem profile                                      the built-in model, into calibration.yaml
  tandem profile ~/models/Qwen3-0.6B -o qwen.yaml
  tandem profile --threads 4 --kv-memory 2GiB         as the instances will be served"""
_ENGINE_SHARE = 0.6  # of the time
_NEGLIGIBLE_BYTES_PER_S = 1e11  # at this rate the size of the KV hardly matters


def run(
    model: Annotated[Path, typer.Argument(help="a checkpoint's folder", show_default="the built-in model")] = (
        BUILT_IN_MODEL
    ),
    output: Annotated[Path, typer.Option("--output", "-o", help="the calibration file")] = Path("calibration.yaml"),
    threads: Annotated[int | None, typer.Option(help="CPU threads of an instance (default: half of the cores)")] = None,
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], typer.Option(help="of weights and KV")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")] = "auto",
    kv_memory: Annotated[str, typer.Option(help="KV pool of an instance")] = "512MiB",
    seconds: Annotated[float, typer.Option(help="time to measure, without loading")] = 75.0,
    no_cluster: Annotated[
        bool, typer.Option("--no-cluster", help="only the engine: no serving factors, no request path")
    ] = False,
) -> int:
    """Measure how long the engine's steps take on this machine (prompts and decode, alone and as a prefill worker and a
    decode worker run them side by side), and what the request path adds. The calibration file goes into an SLO file
    (cluster.nodes.calibration). Measurements that are held out of the fit tell its error. It takes less than two
    minutes; run nothing else on the machine meanwhile."""
    from tandem.profiling.calibrate import calibrate  # imports torch, which takes seconds

    check_model_folder(model)
    if seconds <= 0:
        raise ConfigError("--seconds must be more than 0")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"there is no folder {output.absolute().parent} to write {output.name} into")
    engine = _engine_section(threads, dtype, device, kv_memory)
    if not no_cluster and 2 * engine.threads > usable_cores() > 1:
        print_error(
            f"note: the workers of both roles have {engine.threads} threads each, on {usable_cores()} cores together; "
            "what they measure side by side is that contention. For one colocated instance use --no-cluster"
        )
    with show_progress(sys.stderr) as progress:
        calibration = calibrate(
            model,
            engine,
            today=datetime.now(UTC).date(),
            engine_s=seconds if no_cluster else _ENGINE_SHARE * seconds,
            serving_s=0.0 if no_cluster else (1 - _ENGINE_SHARE) * seconds,
            progress=progress,
        )
    with writing():
        output.write_text(dump_config(calibration), encoding="utf-8")
    print_line(as_text(calibration))
    print_line(f"\nwritten to {output}")
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


def _engine_section(
    threads: int | None, dtype: Literal["auto", "float32", "bfloat16"], device: str, kv_memory: str
) -> EngineSection:
    kv_bytes = parse_bytes(kv_memory)
    if not isinstance(kv_bytes, int) or kv_bytes <= 0:
        raise ConfigError(f"--kv-memory {kv_memory}: write a number of bytes, e.g. 512MiB")
    threads = max(1, usable_cores() // 2) if threads is None else threads
    if threads < 1:
        raise ConfigError(f"--threads must be at least 1, not {threads}")
    return EngineSection(dtype=dtype, device=device, threads=threads, kv_memory=kv_bytes)
