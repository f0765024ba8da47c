"""vLLM's runs of an open loop (`bench.fidelity.vllm`), as the simulator serves them with the roofline's steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.cost_model.samples import device_of, served_model
from bench.fidelity.vllm.run import RUNS, VllmRun, read_requests, replay
from tandem.core.parallel import ParallelShape
from tandem.placement.costs.efficiency import Efficiency, EngineOverhead
from tandem.placement.costs.roofline_cost import RooflineCost


@dataclass(frozen=True, slots=True)
class OpenLoopError:
    """Signed relative errors of means over the requests, and of the rate at which they were served."""

    run: VllmRun
    ttft: float
    tpot: float
    throughput: float


def open_loop_errors(folder: Path, families: Mapping[str, Efficiency], overhead: EngineOverhead) -> list[OpenLoopError]:
    """Nothing is fitted to these runs but the all-reduce between the two RTX PRO 6000. `overhead`: of vLLM."""
    found = []
    for run in RUNS:
        device, shape = device_of(run.hardware), ParallelShape(run.tp)
        model, fit = served_model(run.model), families[device.family]
        cost = RooflineCost(model, device, shape, fit, overhead, devices_per_node=run.tp)
        measured = read_requests(folder, run)
        result = replay(run, cost, measured.stream)
        last_s = float(np.max(measured.first_token_s + measured.tpot_s * (measured.stream.output_tokens - 1)))
        found.append(
            OpenLoopError(
                run,
                float(result.ttft_s.mean() / measured.ttft_s.mean() - 1),
                float(result.tpot_s.mean() / measured.tpot_s.mean() - 1),
                last_s / result.end_s - 1,
            )
        )
    return found
