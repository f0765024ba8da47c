"""`tandem profile`: measure the engine on this machine, for the planner and the simulator."""

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer

from tandem.cli.common import BUILT_IN_MODEL, seconds_from, writing
from tandem.cli.output import print_error, print_line, show_progress
from tandem.cli.outputs import check_outputs
from tandem.core.byte_size import MOST_BYTES, parse_bytes
from tandem.core.config_file import dump_config
from tandem.core.cost_model import StepLoad
from tandem.core.errors import ConfigError
from tandem.core.instance_section import MAX_THREADS, EngineSection
from tandem.core.parallel import ParallelShape
from tandem.deploy.machine import usable_cores
from tandem.deploy.model_folder import check_model_folder
from tandem.placement.costs.calibration import Calibration
from tandem.placement.costs.serving import ServedStep

EPILOG = """\
examples:
  tandem profile                                      the built-in model, into calibration.yaml
  tandem profile ~/models/Qwen3-0.6B -o qwen.yaml
  tandem profile --threads 4 --kv-memory 2GiB         as the instances will be served
  tandem profile --shapes 2x1,4x1                     and instances of two and four ranks"""
_ENGINE_SHARE = 0.6  # of the time
_USUAL_PROMPT = 256  # tokens
_TRANSFER_BYTES = 8 << 20
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
    seconds: Annotated[
        float,
        typer.Option(
            parser=seconds_from(0),
            help="time to measure one rank, without loading; each shape takes a third of it more",
        ),
    ] = 75.0,
    shapes: Annotated[
        str,
        typer.Option(
            help="instances of several ranks to measure, too, as tp x pp, e.g. 2x1,1x2; auto: these two where each "
            "rank has its threads, or a GPU, for itself; none"
        ),
    ] = "auto",
    no_cluster: Annotated[
        bool, typer.Option("--no-cluster", help="only the engine: no serving factors, no request path")
    ] = False,
) -> int:
    """Measure how long the engine's steps take on this machine (prompts and decode, alone and as a prefill worker and a
    decode worker run them side by side), what the request path adds, and the same of instances of several ranks with
    what these exchange. The calibration file goes into an SLO file (cluster.nodes.calibration). Measurements that are
    held out of the fit tell its error. It takes about three minutes, less than two without --shapes; run nothing else
    on the machine meanwhile."""
    from tandem.profiling.calibrate import calibrate, default_shapes  # imports torch, which takes seconds

    check_model_folder(model)
    if seconds <= 0:
        raise ConfigError("--seconds must be more than 0")
    check_outputs({"the calibration": output})
    engine = _engine_section(threads, dtype, device, kv_memory)
    chosen = default_shapes(engine) if shapes == "auto" else _parse_shapes(shapes)
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
            shapes=chosen,
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
    return "\n".join([*lines, *_shape_lines(calibration)])


def _shape_lines(calibration: Calibration) -> list[str]:
    """Of instances of several ranks, beside one of one rank."""
    lines = []
    for shape in calibration.shapes:
        prompt = _times_as_long(calibration, shape.shape, StepLoad.of_prompts(_USUAL_PROMPT))
        step = _times_as_long(calibration, shape.shape, StepLoad.of_decode(1, _USUAL_PROMPT))
        lines.append(
            f"  {shape.shape!s:<13} {prompt:.2f} times as long as one rank for a prompt of {_USUAL_PROMPT} tokens, "
            f"{step:.2f} times for a decode step (error {shape.error.median:.1%})"
        )
    for one in calibration.collectives:
        name = "sums" if one.operation == "all_reduce" else "messages"
        lines.append(
            f"  {name:<13} between {one.ranks} ranks ({one.transport}): {1e6 * one.cost.latency_s:.0f} us and 1 s per "
            f"{one.cost.bytes_per_s / 1e9:.1f} GB"
        )
    plain = next((one.cost for one in calibration.transfers if one.is_plain), None)
    if plain is not None:
        slowest = max(calibration.transfers, key=lambda one: one.cost.seconds(_TRANSFER_BYTES))
        ratio = slowest.cost.seconds(_TRANSFER_BYTES) / plain.seconds(_TRANSFER_BYTES)
        lines.append(
            f"  KV            {1e3 * plain.seconds(_TRANSFER_BYTES):.1f} ms for 8 MiB between instances of one rank, "
            f"at most {ratio:.2f} times as long between others ({slowest.source} to {slowest.destination})"
        )
    return lines


def _times_as_long(calibration: Calibration, shape: ParallelShape, load: StepLoad) -> float:
    one, several = calibration.engine_cost(), calibration.engine_cost(shape)
    assert one is not None
    assert several is not None, "the shape was measured"
    return several.step(load).total_s / one.step(load).total_s


def _parse_shapes(text: str) -> tuple[ParallelShape, ...]:
    """'2x1,1x2' or 'none'. Raises ConfigError."""
    if text == "none":
        return ()
    try:
        shapes = [ParallelShape.parse(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--shapes: {error}, or auto or none") from error
    if any(shape.num_ranks == 1 for shape in shapes) or len(set(shapes)) < len(shapes):
        raise ConfigError(f"--shapes {text}: name shapes of several ranks, each once; one rank is measured anyway")
    return tuple(shapes)


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
    if not isinstance(kv_bytes, int) or not 0 < kv_bytes <= MOST_BYTES:
        raise ConfigError(f"--kv-memory {kv_memory}: write a number of bytes, e.g. 512MiB")
    threads = max(1, usable_cores() // 2) if threads is None else threads
    if not 1 <= threads <= MAX_THREADS:
        raise ConfigError(f"--threads must be at least 1 and at most {MAX_THREADS}, not {threads}")
    return EngineSection(dtype=dtype, device=device, threads=threads, kv_memory=kv_bytes)
