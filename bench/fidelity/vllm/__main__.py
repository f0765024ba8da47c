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
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.common.data_folder import add_data_argument
from bench.fidelity.page import PAGE, markdown_table, write_section
from bench.fidelity.vllm.run import RUNS, VllmRun, calibrated, read_requests, replay
from bench.fidelity.vllm.tables import read_vllm_tables
from tandem.placement.costs.models import model_shape

_PREAMBLE = """\
`python -m bench.fidelity.vllm`: 300 ShareGPT requests at 10 a second on vLLM 0.19, measured by LLMServingSim; both
runs are saturated, so that most of TTFT is queueing. The policy `chunked` stands for vLLM's scheduler, with its limits
(2,048 tokens a step, 256 or 128 sequences, 41,408 tokens of KV on the RTX 4090); a step's time comes from the same
source's layer tables. On two GPUs the tables have no all-reduce: its latency and bandwidth come from the first steps
and seconds of the run. Nothing else is fitted. Aim: TPOT within 5 %, TTFT within 10 %."""


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
