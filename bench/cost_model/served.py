"""Published points of serving engines in a closed loop, and the same served by the simulator.

Each point is one instance under a constant number of requests, all with prompts and answers of one length. The
simulator serves it with the scheduling code of the product, so TPOT and throughput are what a client sees, prompts
beside decoding included. What no table says is assumed: an engine's prompt tokens in a step and the spread of answers
(`_ENGINES`), how long the benchmark ran (`_WAVES`), KV in fp8 (`_KV_FP8`).

In such a closed loop, what a step holds does not depend on how long steps take: requests come when others end. So times
are linear in an engine's seconds per step and per sequence and in its kernels' latencies, and a few simulations of each
point price it for any overhead (`PricedPoint`); `tests/bench/test_served.py` compares that with simulations.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bench.cost_model.samples import device_of, is_held_out, read_rows
from tandem.core.cost_model import CostModel, StepCost, StepLoad
from tandem.core.model_shape import ModelShape
from tandem.core.parallel import ParallelShape
from tandem.core.precision import AS_STORED, Precision
from tandem.placement.costs.efficiency import Efficiency, EngineOverhead
from tandem.placement.costs.hardware import Device
from tandem.placement.costs.models import model_shape
from tandem.placement.costs.roofline import RooflineSource
from tandem.placement.costs.roofline_cost import RooflineCost
from tandem.placement.simulator import simulate
from tandem.placement.simulator.deployment import Deployment, InstanceSpec
from tandem.placement.workload.requests import Floats, RequestStream
from tandem.scheduling.budget import Mixing

SLOWDOWNS = (1.0, 1.2, 1.5)
"""At which a point is simulated; between them its times are interpolated."""

_WAVES = 4  # requests of a run, as a multiple of the concurrency
_MAX_POINTS = 8  # of an engine, device, model, precision and half: more say the same
_BLOCK_TOKENS = 16
_MODELS = {
    "meta-llama/Llama-3.1-8B-Instruct": "Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B": "Llama-3.1-70B",
    "Qwen/Qwen3-32B": "Qwen3-32B",
}
_PRECISIONS = {"": AS_STORED, "fp8": Precision(weights="fp8"), "fp8_block": Precision(weights="fp8")}
_KV_FP8 = frozenset({"Llama-3.1-70B"})
"""Served with KV in fp8: more sequences take less longer than reading their KV in bf16 at the peak of the memory."""
_SYSTEMS = ("h100_sxm", "h200_sxm", "b200_sxm")
_NO_OVERHEAD = EngineOverhead(step_s=0.0, sequence_s=0.0, eager_layer_s=0.0, graph_decode=True)


@dataclass(frozen=True, slots=True)
class ServedEngine:
    """How the simulator's instance stands for an engine: `max_batch_tokens` of a step, how it mixes prompts, and by
    which part answers are longer or shorter than said. Where they are not, requests stay in step, and each waits for
    the prompts of all: so are SGLang's TTFTs, and not those of the others."""

    max_batch_tokens: int
    policy: Mixing
    spread: float


_ENGINES = {
    "vllm": ServedEngine(8192, "chunked", 0.1),
    "trtllm": ServedEngine(8192, "chunked", 0.1),
    "sglang": ServedEngine(8192, "prompt_first", 0.0),
}


@dataclass(frozen=True, slots=True)
class ServedPoint:
    """`concurrency` requests at a time. TTFT and TPOT, in seconds, are as published."""

    engine: str
    device: Device
    model: ModelShape
    shape: ParallelShape
    prompt_tokens: int
    output_tokens: int
    concurrency: int
    ttft_s: float
    tpot_s: float
    held_out: bool

    @property
    def throughput(self) -> float:
        return self.throughput_of(self.ttft_s, self.tpot_s)

    def throughput_of(self, ttft_s: float, tpot_s: float) -> float:
        """Requests per second, by Little's law."""
        return self.concurrency / (ttft_s + (self.output_tokens - 1) * tpot_s)


def read_points(folder: Path) -> list[ServedPoint]:
    """Dense models with weights in bf16 and in fp8, colocated, with KV memory for all requests at once: how much an
    engine had is not published. vLLM's points of Llama-3.1-8B in fp8 are left out: some need 96 % of an H200's peak for
    prompts alone, so these were cached. Raises ConfigError."""
    groups: dict[tuple[object, ...], list[ServedPoint]] = {}
    for point in _points(folder):
        tokens = point.concurrency * (point.prompt_tokens + point.output_tokens)
        if tokens <= _kv_tokens(point):
            key = point.engine, point.device.name, point.model.name, point.model.weight_bytes, point.held_out
            groups.setdefault(key, []).append(point)
    return [point for group in groups.values() for point in group[:: -(-len(group) // _MAX_POINTS)]]


def _points(folder: Path) -> Iterator[ServedPoint]:
    for row in read_rows(folder, "aic_e2e_silicon_sample.csv.gz"):
        precision, name = _PRECISIONS.get(row["gemm_quant_mode"]), _MODELS.get(row["model_path"])
        is_known = precision is not None and name is not None and row["system"] in _SYSTEMS and row["mode"] == "agg"
        if not is_known or not row["silicon_tpot_ms"] or not row["concurrency"] or int(row["osl"]) < 2:
            continue
        concurrency = int(row["concurrency"])
        if float(row["attention_dp_size"] or 1) != 1 or concurrency != int(float(row["batch_size"] or 0)):
            continue
        assert name is not None
        assert precision is not None
        if name in _KV_FP8:
            precision = precision.model_copy(update={"kv": "fp8"})
        shape = ParallelShape(int(float(row["tp_size"])))
        yield ServedPoint(
            row["backend"],
            device_of(row["system"]),
            model_shape(name, precision),
            shape,
            int(row["isl"]),
            int(row["osl"]),
            concurrency,
            float(row["silicon_ttft_ms"]) / 1e3,
            float(row["silicon_tpot_ms"]) / 1e3,
            is_held_out(name, row["system"], shape.tp, row["isl"], row["osl"], concurrency),
        )


def served(point: ServedPoint, to: Efficiency, overhead: EngineOverhead) -> tuple[float, float]:
    """(TTFT, TPOT), means in seconds over all requests of the run, as the simulator serves the point. `to` is the
    efficiency of the family of the point's device."""
    shape = point.shape
    return _serve(point, RooflineCost(point.model, point.device, shape, to, overhead, devices_per_node=shape.num_ranks))


def _serve(point: ServedPoint, cost: CostModel) -> tuple[float, float]:
    engine, count = _ENGINES[point.engine], _WAVES * point.concurrency
    uniform = np.random.default_rng(0).uniform(1 - engine.spread, 1 + engine.spread, count)
    outputs = np.maximum(2, np.rint(point.output_tokens * uniform)).astype(np.int64)
    instance = InstanceSpec(
        point.engine,
        "colocated",
        cost,
        num_blocks=_kv_tokens(point) // _BLOCK_TOKENS,
        block_size=_BLOCK_TOKENS,
        max_batch_tokens=engine.max_batch_tokens,
        max_batch=point.concurrency,
        policy=engine.policy,
        growth_horizon_tokens=0,
    )
    stream = RequestStream.make(np.zeros(count), np.full(count, point.prompt_tokens), outputs)
    result = simulate(Deployment((instance,)), stream, concurrency=point.concurrency)
    return float(result.ttft_s.mean()), float(result.tpot_s.mean())


def _kv_tokens(point: ServedPoint) -> int:
    source = RooflineSource(point.model, {point.device.name: point.device})
    return source.kv_tokens(point.device.name, point.shape)


@dataclass(frozen=True, slots=True)
class PricedPoint:
    """What the simulator makes of a point, for any overhead: (TTFT, TPOT) without overheads at each of `SLOWDOWNS`,
    [len(SLOWDOWNS), 2]; the latencies of kernels in them; and how many steps and sampled tokens pass."""

    point: ServedPoint
    kernels_s: Floats
    latencies_s: Floats
    steps: Floats
    sampled: Floats

    def times_s(self, overhead: EngineOverhead) -> tuple[float, float]:
        """(TTFT, TPOT)."""
        kernels = (np.interp(overhead.slowdown, SLOWDOWNS, self.kernels_s[:, column]) for column in (0, 1))
        ttft_s, tpot_s = (
            float(kernel + (overhead.latency - 1) * latency_s + overhead.step_s * steps + overhead.sequence_s * sampled)
            for kernel, latency_s, steps, sampled in zip(
                kernels, self.latencies_s, self.steps, self.sampled, strict=True
            )
        )
        return ttft_s, tpot_s


def priced(point: ServedPoint, to: Efficiency) -> PricedPoint:
    """By simulations of the point."""
    kernels = [served(point, to, replace(_NO_OVERHEAD, slowdown=slowdown)) for slowdown in SLOWDOWNS]
    without = np.array(served(point, to, replace(_NO_OVERHEAD, latency=0.0)))
    latencies_s = kernels[SLOWDOWNS.index(1.0)] - without
    steps = np.array(_serve(point, _CountCost(1.0, 0.0)))
    both = np.array(_serve(point, _CountCost(1.0, 1.0)))
    return PricedPoint(point, np.array(kernels), latencies_s, steps, both - steps)


@dataclass(frozen=True, slots=True)
class _CountCost:
    """A `CostModel` whose seconds count steps and sampled tokens."""

    per_step: float
    per_sampled: float

    def step(self, load: StepLoad) -> StepCost:
        seconds = self.per_step + self.per_sampled * load.sampled
        return StepCost(overhead_s=seconds, interval_s=seconds)

    def decode_coefficients(self, sequences: int) -> tuple[float, float]:
        return self.per_step + self.per_sampled * sequences, 0.0
