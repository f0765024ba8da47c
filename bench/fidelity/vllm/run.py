"""Two runs of vLLM 0.19 that LLMServingSim measured, and how the simulator replays them."""

import csv
import gzip
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bench.fidelity.vllm.tables import VllmTableModel
from tandem.core.cost_model import CostModel, StepLoad
from tandem.placement.simulator import simulate
from tandem.placement.simulator.deployment import Deployment, InstanceSpec
from tandem.placement.simulator.result import SimulationResult
from tandem.placement.workload.requests import Floats, RequestStream

_BLOCK_TOKENS = 16
MAX_BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class VllmRun:
    """One run, with the names of the data. `kv_tokens` None: not in the log, and memory is no limit."""

    hardware: str
    model: str
    tp: int
    max_num_seqs: int
    kv_tokens: int | None


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
    missing_s = prompt_step_s - model.step(StepLoad.of_prompts(MAX_BATCH_TOKENS // 2, MAX_BATCH_TOKENS // 2)).total_s
    step_s, sequences = _first_decoding_second(data, run)
    mean_context = float((measured.stream.prompt_tokens + measured.stream.output_tokens / 4)[:sequences].mean())
    decode_s = model.step(StepLoad.of_decode(sequences, int(sequences * mean_context))).total_s
    calls = 2 * model.shape.num_layers
    bytes_per_token = calls * model.shape.hidden_size * 2
    per_byte_s = (missing_s - (step_s - decode_s)) / ((MAX_BATCH_TOKENS - sequences) * bytes_per_token)
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


def replay(run: VllmRun, cost: CostModel, stream: RequestStream) -> SimulationResult:
    kv_tokens = run.kv_tokens or 10 * int((stream.prompt_tokens + stream.output_tokens).max()) * run.max_num_seqs
    instance = InstanceSpec(
        instance_id=run.hardware,
        role="colocated",
        cost=cost,
        num_blocks=kv_tokens // _BLOCK_TOKENS,
        block_size=_BLOCK_TOKENS,
        max_batch_tokens=MAX_BATCH_TOKENS,
        max_batch=run.max_num_seqs,
        policy="chunked",
        growth_horizon_tokens=0,
    )
    return simulate(Deployment((instance,)), stream)
