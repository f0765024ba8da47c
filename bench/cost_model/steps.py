"""Public measurements of whole steps, as samples to check the roofline with an engine's overheads.

Half of each system's configurations is used to fit the overheads of its engine (`EngineOverhead`), the other half is
held out. The operators' efficiencies come from other tables and are not changed.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from bench.common.distserve_costs import DEVICE, DistServeEngine, DistServeSource
from bench.cost_model.operator_tables import layer_times
from bench.cost_model.samples import is_held_out, read_rows, served_model
from tandem.core.cost_model import StepLoad, attention_pairs
from tandem.core.model_shape import ModelShape
from tandem.core.parallel import ParallelShape
from tandem.placement.costs.efficiency import Efficiency, EngineOverhead
from tandem.placement.costs.hardware import Device, devices
from tandem.placement.costs.models import model_shape
from tandem.placement.costs.roofline_cost import RooflineCost

_BLOOM = ModelShape("BLOOM-176B", 70, 14336, 112, 112, 128, 57344, 250880, 2048, gated_mlp=False, tied_embeddings=True)
_YI = ModelShape("Yi-34B", 60, 7168, 56, 8, 128, 20480, 64000, 200000)
_OPT_PROMPTS = ((128, 1), (256, 1), (512, 1), (1024, 1), (2047, 1), (256, 4), (512, 4))  # (tokens, sequences)
_OPT_BATCHES = (1, 4, 8, 16, 32, 64, 128)
_FREE_BYTES = 50e6  # of a message, near where congestion begins
_SARATHI_CONTEXT_TOKENS = 1024  # assumed: the table does not say over how many tokens its sequences decode


@dataclass(frozen=True, slots=True)
class StepSample:
    """The total time of steps, measured with a `system`: `loads` are (load, number of such steps). `phase` is prefill,
    decode, or mixed."""

    system: str
    phase: str
    model: ModelShape
    device: Device
    shape: ParallelShape
    loads: tuple[tuple[StepLoad, int], ...]
    seconds: float
    held_out: bool

    def predict(self, to: Efficiency, overhead: EngineOverhead) -> float:
        cost = _cost(self.model, self.device, self.shape, to, overhead)
        return sum(count * cost.step(load).total_s for load, count in self.loads)


@cache
def _cost(
    model: ModelShape, device: Device, shape: ParallelShape, to: Efficiency, overhead: EngineOverhead
) -> RooflineCost:
    return RooflineCost(model, device, shape, to, overhead, devices_per_node=shape.num_ranks)


def read_steps(folder: Path) -> list[StepSample]:
    return [*_splitwise(folder), *_sarathi(folder), *_distserve(), *_llmservingsim(folder)]


def _splitwise(folder: Path) -> Iterator[StepSample]:
    """A batch of equal prompts, then decoding; vLLM of 2023. One system per host: the host's CPU bounds decode."""
    hosts = {"a100-80gb": ("splitwise-a100", "A100-80GB-SXM4"), "h100-80gb": ("splitwise-h100", "H100-80GB-SXM5")}
    for row in read_rows(folder, "splitwise_dgx_prompt_token_latency.csv"):
        batch, prompt, tp = int(row["batch_size"]), int(row["prompt_size"]), int(row["tensor_parallel"])
        if row["hardware"] not in hosts:  # power-capped ones were computed, not measured
            continue
        if (tp, batch) == (2, 64):  # a tenth of the time of half the batch: its KV did not fit
            continue
        system, device = hosts[row["hardware"]]
        model = _BLOOM if row["model"] == "bloom-176b" else model_shape("Llama-2-70B")
        held_out = is_held_out(row["model"], tp, prompt, batch)
        mean_context = prompt + int(row["token_size"]) // 2
        for phase, load, column in (
            ("prefill", StepLoad.of_prompts(*[prompt] * batch), "prompt_time_ms"),
            ("decode", StepLoad.of_decode(batch, batch * mean_context), "token_time_ms"),
        ):
            seconds = float(row[column]) / 1e3
            shape = ParallelShape(tp)
            yield StepSample(system, phase, model, devices()[device], shape, ((load, 1),), seconds, held_out)


def _sarathi(folder: Path) -> Iterator[StepSample]:
    """Yi-34B on two A100-PCIe joined by an NVLink bridge; no CUDA graphs, sampling in Python."""
    pair = replace(devices()["A100-80GB-PCIe"], nvlink_bytes_per_s=300e9)
    for row in read_rows(folder, "sarathi_yi34b_2xA100pcie_tp2.csv"):
        prompt, decode = int(row["prefill_tokens"]), int(row["decode_tokens"])
        if prompt == 256:  # slower than 512 tokens: the first run of its kind
            continue
        if "metrics on" in row["experiment"] and not prompt:  # the same batch takes 49 ms, not 68, without them
            continue
        chunk = int(row["chunk_size"] or prompt or 1)
        loads = [_chunk(start, min(chunk, prompt - start)) for start in range(0, prompt, chunk)] or [StepLoad()]
        if decode:
            kv_tokens = decode * _SARATHI_CONTEXT_TOKENS
            sampled = loads[0].sampled + decode
            loads = [replace(loads[0], decode_sequences=decode, decode_kv_tokens=kv_tokens, sampled=sampled)]
        phase = "mixed" if prompt and decode else "prefill" if prompt else "decode"
        held_out = is_held_out(prompt, decode, chunk)
        counted = tuple((load, 1) for load in loads)
        yield StepSample("sarathi", phase, _YI, pair, ParallelShape(2), counted, float(row["time_ms"]) / 1e3, held_out)


def _chunk(start: int, num_tokens: int) -> StepLoad:
    return StepLoad(
        prefill_tokens=num_tokens,
        prefill_sequences=1,
        prefill_pairs=attention_pairs(start, num_tokens),
        prefill_kv_tokens=start + num_tokens,
        sampled=1,
    )


def _distserve() -> Iterator[StepSample]:
    """OPT on A100s, by the lines that DistServe's authors fitted to their engine and to vLLM 0.2.3. Prompts of at most
    2,048 tokens in a step."""
    device = devices()[DEVICE]
    engines: tuple[DistServeEngine, ...] = ("distserve", "vllm")
    for engine, name, tp in itertools.product(engines, ("OPT-13B", "OPT-66B"), (1, 2, 4, 8)):
        cost = DistServeSource(name, engine, ray_overhead=False).cost_model(DEVICE, ParallelShape(tp))
        if cost is None or (engine, name, tp) == ("vllm", "OPT-66B", 2):  # the latter's line falls with the length
            continue
        prefills = [StepLoad.of_prompts(*[length] * count) for length, count in _OPT_PROMPTS]
        decodes = [StepLoad.of_decode(batch, 500 * batch) for batch in _OPT_BATCHES]
        for phase, loads in (("prefill", prefills), ("decode", decodes)):
            for load in loads:
                step = cost.step(load)
                seconds = step.linear_s + step.attention_s + step.kv_read_s  # without the hand-over of its simulator
                system = "distserve" if engine == "distserve" else "vllm-0.2.3"
                held_out = is_held_out(name, tp, load.tokens, load.decode_sequences)
                shape = ParallelShape(tp)
                yield StepSample(system, phase, model_shape(name), device, shape, ((load, 1),), seconds, held_out)


def _llmservingsim(folder: Path) -> Iterator[StepSample]:
    """Steps composed from LLMServingSim's tables of the parts of a layer: every load of the attention table, times all
    layers. The tables have no collectives. Half of the operators' rows were fitted."""
    layers = layer_times(folder)
    heads = {
        (row["hardware"], row["model"], int(row["tp"]), row["layer"], int(row["sequences"])): float(row["time_us"])
        / 1e6
        for row in read_rows(folder, "llmservingsim_per_sequence_us.csv.gz")
    }
    names = {"RTX4090": "RTX4090", "RTXPRO6000": "RTX-PRO-6000-Blackwell"}
    for row in read_rows(folder, "llmservingsim_attention_us.csv.gz"):
        chunk, decode, tp = int(row["prefill_chunk"]), int(row["n_decode"]), int(row["tp"])
        key = row["hardware"], row["model"], tp
        tokens, sampled = chunk + decode, decode + (chunk > 0)
        layer, model = layers.get((*key, tokens)), served_model(row["model"])
        head = heads.get((*key, "lm_head", sampled)), heads.get((*key, "sampler", sampled))
        if tp != 1 or layer is None or None in head or model.moe is not None:
            continue
        once = ("embedding", "final_layernorm")
        each = sum(seconds * (2 if name == "layernorm" else 1) for name, seconds in layer.items() if name not in once)
        attention_s = float(row["time_us"]) / 1e6
        seconds = model.num_layers * (each + attention_s) + sum(layer[name] for name in once) + sum(filter(None, head))
        load = StepLoad(
            prefill_tokens=chunk,
            prefill_sequences=int(chunk > 0),
            prefill_pairs=attention_pairs(int(row["kv_prefill"]), chunk),
            prefill_kv_tokens=chunk and int(row["kv_prefill"]) + chunk,
            decode_sequences=decode,
            decode_kv_tokens=decode * int(row["kv_decode"]),
            sampled=sampled,
        )
        phase = "mixed" if chunk and decode else "prefill" if chunk else "decode"
        device = devices()[names[row["hardware"]]]
        yield StepSample("llmservingsim", phase, model, device, ParallelShape(tp), ((load, 1),), seconds, True)


def fit_overhead(steps: Sequence[StepSample], to: Mapping[str, Efficiency]) -> EngineOverhead:
    """The overhead of one system with the least squares of log(predicted / measured) over the steps that are not held
    out. Steps without large messages between more than two ranks do not show congestion."""
    chosen = [step for step in steps if not step.held_out]
    start = {"step_s": 2.5e-3, "sequence_s": 20e-6, "slowdown": 1.1, "eager_layer_s": 0.3e-3, "prompt_layer_s": 0.1e-3}
    if any(step.shape.tp > 2 and _largest_message_bytes(step) > _FREE_BYTES for step in chosen):
        start |= {"free_bytes": _FREE_BYTES, "congestion_s": 20e-12}
    scale = np.array(list(start.values()))

    def at(factors: Sequence[float]) -> EngineOverhead:
        values = dict(zip(start, (scale * factors).tolist(), strict=True))
        return EngineOverhead(graph_decode=False, **values)

    def residuals(factors: Sequence[float]) -> list[float]:
        overhead = at(factors)
        return [math.log(step.predict(to[step.device.family], overhead) / step.seconds) for step in chosen]

    least = [1.0 / scale[i] if name == "slowdown" else 0.0 for i, name in enumerate(start)]
    bounds = least, np.full(len(start), 100.0)
    found = least_squares(residuals, np.ones(len(start)), bounds=bounds, loss="soft_l1", f_scale=0.1, diff_step=0.01)
    _cost.cache_clear()
    return at(found.x)


def _largest_message_bytes(step: StepSample) -> float:
    return max(2.0 * load.tokens * step.model.hidden_size for load, _ in step.loads)
