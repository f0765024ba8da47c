"""The live cluster in the simulator: one prefill and one decode worker on one machine."""

from collections.abc import Mapping
from typing import Any

from tandem.core.instance_section import EngineSection, InstanceSection
from tandem.models.random_checkpoint import CheckpointShape
from tandem.placement.costs.calibration import Calibration
from tandem.placement.costs.step_fit import CalibratedCost
from tandem.placement.simulator import simulate
from tandem.placement.simulator.deployment import Deployment, InstanceSpec
from tandem.placement.simulator.result import SimulationResult
from tandem.placement.workload.requests import RequestStream
from tandem.scheduling.budget import PREFILL_BATCH_TOKENS

CHECKPOINT = CheckpointShape(
    hidden_size=640,
    intermediate_size=1728,
    num_hidden_layers=10,
    num_attention_heads=10,
    num_key_value_heads=5,
    head_dim=64,
    vocab_size=8192,
)
ENGINE = EngineSection(threads=1, kv_memory=512 << 20)
_ROUNDS = 4


def simulate_one_and_one(calibration: Calibration, stream: RequestStream) -> SimulationResult:
    """Each worker slows the other by the share of time during which it is busy. These shares are a result of the
    simulation, which is therefore repeated with the shares of the previous round."""
    busy = {"prefill": 0.5, "decode": 0.5}
    for _ in range(_ROUNDS):
        result = simulate(_deployment(calibration, busy), stream)
        busy = {use.role: min(1.0, use.busy_s / result.end_s) for use in result.instances}
    return result


def _deployment(calibration: Calibration, busy: Mapping[str, float]) -> Deployment:
    """One instance of each role with the settings `ENGINE`. `busy`: share of the time, by role."""
    block_size = ENGINE.block_size
    num_blocks = int(calibration.kv_memory_bytes // (calibration.kv_bytes_per_token * block_size))
    pool: dict[str, Any] = {"num_blocks": num_blocks, "block_size": block_size}
    serving = calibration.serving
    prefill_cost, decode_cost = (
        CalibratedCost(calibration.terms, serving, contended=busy[other]) for other in ("decode", "prefill")
    )
    return Deployment(
        instances=(
            InstanceSpec(
                "prefill-0",
                "prefill",
                prefill_cost,
                **pool,
                max_batch_tokens=PREFILL_BATCH_TOKENS,
                cold_step_factor=busy["decode"] * serving.cold_step_factor,
            ),
            InstanceSpec(
                "decode-0",
                "decode",
                decode_cost,
                **pool,
                max_batch=InstanceSection().max_batch,
                request_admission_cost_s=serving.request_admission_cost_s,
            ),
        ),
        network=calibration.network_spec(contended=busy["prefill"]),
        router=calibration.router_spec(),
    )
