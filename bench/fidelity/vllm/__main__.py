"""How far is the simulator from real vLLM? 300 ShareGPT requests at 10 a second, measured by LLMServingSim.

Two runs of vLLM 0.19: one on a single RTX 4090 whose KV memory is always full (sequences wait, some are preempted), and
one on two RTX PRO 6000 whose limit is the number of sequences. The colocated policy `chunked` stands for vLLM's
scheduler; a step's time comes from the layer tables of the same source (`tables.py`).

The tables lack the all-reduce between two GPUs. Its latency and bandwidth come from the beginning of the run: the first
steps of 2,048 prompt tokens, and the first seconds that only decode. Nothing else is fitted.

    python -m bench.fidelity.vllm            prints the table
    python -m bench.fidelity.vllm --write    also writes the section of docs/fidelity.md
"""

import argparse
import csv
import gzip
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bench.common.data_folder import add_data_argument
from bench.fidelity.page import PAGE, markdown_table, write_section
from bench.fidelity.vllm.tables import VllmTableModel, read_vllm_tables
from tandem.core.cost_model import StepLoad
from tandem.placement.costs.models import model_shape
from tandem.placement.simulator import simulate
from tandem.placement.simulator.deployment import Deployment, InstanceSpec
from tandem.placement.simulator.result import SimulationResult
from tandem.placement.workload.requests import Floats, RequestStream

_BLOCK_TOKENS = 16
_MAX_BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class VllmRun:
    """One run, with the names of the data. `kv_tokens` None: not in the log, and memory is no limit."""

    hardware: str
    model: str
    tp: int
    max_num_seqs: int
    kv_tokens: int | None


_PREAMBLE = """\
`python -m bench.fidelity.vllm`: 300 ShareGPT requests at 10 a second on vLLM 0.19, measured by LLMServingSim; both
runs are saturated, so that most of TTFT is queueing. The policy `chunked` stands for vLLM's scheduler, with its limits
(2,048 tokens a step, 256 or 128 sequences, 41,408 tokens of KV on the RTX 4090); a step's time comes from the same
source's layer tables. On two GPUs the tables have no all-reduce: its latency and bandwidth come from the first steps
and seconds of the run. Nothing else is fitted. Aim: TPOT within 5 %, TTFT within 10 %."""

RUNS = (
    VllmRun("RTX4090", "Llama-3.1-8B", 1, 256, 41_408),
    VllmRun("RTXPRO6000", "Qwen3-32B", 2, 128, None),
)


@dataclass(frozen=True, slots=True)
class MeasuredRequests:
    """One entry per request, in order of arrival; seconds."""

    stream: RequestStream
    ttft_s: Floats
    tpot_s: Floats
    first_token_s: Floats


def read_requests(data: Path, run: VllmRun) -> MeasuredRequests:
    """Latencies count from the arrival, as a client measures them. Raises FileNotFoundError."""
    with gzip.open(data / "latency" / "llmservingsim_vllm_requests_measured.csv.gz", "rt", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row["hardware"], row["model"]) == (run.hardware, run.model)]
    column = {
        name: np.array([float(row[name]) for row in rows])
        for name in ("arrival_s", "input_tokens", "output_tokens", "first_token_s", "last_token_s")
    }
    outputs = column["output_tokens"].astype(np.int64)
    stream = RequestStream.make(column["arrival_s"], column["input_tokens"].astype(np.int64), outputs)
    return MeasuredRequests(
        stream=stream,
        ttft_s=column["first_token_s"] - column["arrival_s"],
        tpot_s=(column["last_token_s"] - column["first_token_s"]) / (outputs - 1),
        first_token_s=column["first_token_s"],
    )


def calibrated(model: VllmTableModel, data: Path, run: VllmRun, measured: MeasuredRequests) -> VllmTableModel:
    """`model` with the all-reduce that explains the first prompt steps and decoding seconds of the run."""
    if run.tp == 1:
        return model
    early = np.unique(measured.first_token_s[:20])
    prompt_step_s = float(np.median(np.diff(early)))
    missing_s = prompt_step_s - model.step(StepLoad.of_prompts(_MAX_BATCH_TOKENS // 2, _MAX_BATCH_TOKENS // 2)).total_s
    step_s, sequences = _first_decoding_second(data, run)
    mean_context = float((measured.stream.prompt_tokens + measured.stream.output_tokens / 4)[:sequences].mean())
    decode_s = model.step(StepLoad.of_decode(sequences, int(sequences * mean_context))).total_s
    calls = 2 * model.shape.num_layers
    bytes_per_token = calls * model.shape.hidden_size * 2
    per_byte_s = (missing_s - (step_s - decode_s)) / ((_MAX_BATCH_TOKENS - sequences) * bytes_per_token)
    latency_s = (step_s - decode_s) / calls - per_byte_s * sequences * bytes_per_token / calls
    return replace(model, all_reduce_s_per_byte=per_byte_s, all_reduce_latency_s=max(0.0, latency_s))


def _first_decoding_second(data: Path, run: VllmRun) -> tuple[float, int]:
    """(seconds of a step, sequences) in the first seconds when a full batch decoded and no prompt was computed."""
    with gzip.open(data / "latency" / "llmservingsim_vllm_timeseries_measured.csv.gz", "rt", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if (row["hardware"], row["model"]) == (run.hardware, run.model)]
    steady = [
        float(row["gen_throughput"])
        for row in rows
        if float(row["prompt_throughput"]) == 0 and int(row["running"]) == run.max_num_seqs
    ]
    return run.max_num_seqs / float(np.mean(steady[:8])), run.max_num_seqs


def replay(run: VllmRun, model: VllmTableModel, stream: RequestStream) -> SimulationResult:
    kv_tokens = run.kv_tokens or 10 * int((stream.prompt_tokens + stream.output_tokens).max()) * run.max_num_seqs
    instance = InstanceSpec(
        instance_id=run.hardware,
        role="colocated",
        cost=model,
        num_blocks=kv_tokens // _BLOCK_TOKENS,
        block_size=_BLOCK_TOKENS,
        max_batch_tokens=_MAX_BATCH_TOKENS,
        max_batch=run.max_num_seqs,
        policy="chunked",
        growth_horizon_tokens=0,
    )
    return simulate(Deployment((instance,)), stream)


def compare(data: Path, run: VllmRun) -> list[tuple[str, ...]]:
    """Rows of the table: latency, measured, simulated, error."""
    measured = read_requests(data, run)
    model = calibrated(read_vllm_tables(data, run.hardware, model_shape(run.model), run.tp), data, run, measured)
    result = replay(run, model, measured.stream)
    rows: list[tuple[str, ...]] = []

    def add_row(label: str, measured_s: float, simulated_s: float) -> None:
        error = f"{100 * (simulated_s / measured_s - 1):+.1f} %"
        rows.append((f"{run.hardware} {run.model}", label, f"{measured_s:.4g} s", f"{simulated_s:.4g} s", error))

    for name, real, simulated in (
        ("TTFT", measured.ttft_s, result.ttft_s),
        ("TPOT", measured.tpot_s, result.tpot_s),
    ):
        for statistic, of in (("mean", np.mean), ("median", np.median), ("p99", lambda x: np.percentile(x, 99))):
            add_row(f"{name} {statistic}", float(of(real)), float(of(simulated)))
    last_token_s = float((measured.first_token_s + measured.tpot_s * (measured.stream.output_tokens - 1)).max())
    add_row("makespan", last_token_s, float(np.nanmax(result.stamps)))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fidelity.vllm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_argument(parser, "latency/")
    parser.add_argument("--write", action="store_true", help=f"write the section of {PAGE.name}")
    options = parser.parse_args(arguments)
    try:
        rows = [row for run in RUNS for row in compare(options.data, run)]
    except FileNotFoundError as error:
        print(f"{error.filename} does not exist; give the data folder with --data", file=sys.stderr)
        return 1
    text = "\n".join([_PREAMBLE, "", *markdown_table(("run", "latency", "measured", "simulated", "error"), rows)])
    print(text)
    if options.write:
        write_section("Real vLLM", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
