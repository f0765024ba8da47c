"""The roofline: monotone in loads and devices, additive, affine in decode's KV, and near what others measured."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.cost_model import StepLoad, attention_pairs
from tandem.core.errors import ConfigError
from tandem.core.parallel import ParallelShape
from tandem.core.precision import AS_STORED, Precision
from tandem.core.slo import SloClass
from tandem.placement.costs.efficiency import Efficiency, efficiency, engine_overhead
from tandem.placement.costs.hardware import devices
from tandem.placement.costs.models import model_shape, published_models
from tandem.placement.costs.roofline import RooflineSource
from tandem.placement.costs.roofline_cost import RooflineCost
from tandem.placement.search.kinds import phase_kind
from tandem.placement.search.limits import limit_of
from tandem.placement.workload.requests import RequestStream

_H100 = "H100-80GB-SXM5"
_MODELS = ("Llama-3.1-8B", "OPT-13B", "Mixtral-8x7B", "DeepSeek-V2-Lite")
_ENGINES = ("vllm", "splitwise-a100", "none")

_models = st.sampled_from(_MODELS)
_names = st.sampled_from(sorted(devices()))
_shapes = st.sampled_from([ParallelShape(tp, pp) for tp in (1, 2, 4) for pp in (1, 2, 3)])
_prompts = st.lists(st.integers(1, 4000), max_size=4)
_sequences = st.integers(0, 300)


def _cost(model: str, device: str, shape: ParallelShape, engine: str = "vllm") -> RooflineCost:
    cost = RooflineSource(published_models()[model], devices(), engine=engine).cost_model(device, shape)
    assert cost is not None
    return cost


def _load(prompts: list[int], sequences: int, kv_tokens: int) -> StepLoad:
    load, decode = StepLoad.of_prompts(*prompts), StepLoad.of_decode(sequences, kv_tokens)
    return replace(
        load,
        decode_sequences=sequences,
        decode_kv_tokens=decode.decode_kv_tokens if sequences else 0,
        sampled=load.sampled + sequences,
    )


@settings(max_examples=60, deadline=None)
@given(
    model=_models,
    device=_names,
    tp=st.sampled_from([1, 2, 4]),
    engine=st.sampled_from(_ENGINES),
    prompts=_prompts,
    sequences=_sequences,
    context_tokens=st.integers(1, 10_000),
    more_prompts=_prompts,
    more_sequences=_sequences,
    more_context_tokens=st.integers(0, 10_000),
)
def test_more_work_never_costs_less(
    model: str,
    device: str,
    tp: int,
    engine: str,
    prompts: list[int],
    sequences: int,
    context_tokens: int,
    more_prompts: list[int],
    more_sequences: int,
    more_context_tokens: int,
) -> None:
    """Contexts are means: the same KV over more sequences may take less, since cores then share the work better."""
    cost = _cost(model, device, ParallelShape(tp), engine)
    less = cost.step(_load(prompts, sequences, sequences * context_tokens))
    more_kv_tokens = (sequences + more_sequences) * (context_tokens + more_context_tokens)
    more = cost.step(_load(prompts + more_prompts, sequences + more_sequences, more_kv_tokens))
    assert more.total_s >= less.total_s * (1 - 1e-12)


@settings(max_examples=60, deadline=None)
@given(
    model=_models,
    name=_names,
    shape=_shapes,
    prompts=_prompts,
    sequences=_sequences,
    faster=st.floats(1.0, 10.0),
    what=st.sampled_from(["flops", "memory_bytes_per_s", "nvlink_bytes_per_s", "pcie_bytes_per_s"]),
)
def test_a_faster_device_is_never_slower(
    model: str, name: str, shape: ParallelShape, prompts: list[int], sequences: int, faster: float, what: str
) -> None:
    device = devices()[name]
    better = replace(device, **{what: getattr(device, what) * faster})
    source = RooflineSource(published_models()[model], {"old": device, "new": better})
    old, new = source.cost_model("old", shape), source.cost_model("new", shape)
    assert old is not None
    assert new is not None
    load = _load(prompts, sequences, 500 * sequences)
    assert new.step(load).total_s <= old.step(load).total_s * (1 + 1e-12)
    assert new.step(load).interval_s <= old.step(load).interval_s * (1 + 1e-12)


@settings(max_examples=100, deadline=None)
@given(
    model=_models,
    device=_names,
    shape=_shapes,
    engine=st.sampled_from(_ENGINES),
    sequences=st.integers(1, 500),
    kv_tokens=st.integers(1, 1_000_000),
)
def test_decode_coefficients_equal_the_step(
    model: str, device: str, shape: ParallelShape, engine: str, sequences: int, kv_tokens: int
) -> None:
    cost = _cost(model, device, shape, engine)
    base_s, per_kv_token_s = cost.decode_coefficients(sequences)
    step = cost.step(StepLoad.of_decode(sequences, kv_tokens))
    assert base_s + kv_tokens * per_kv_token_s == pytest.approx(step.total_s, rel=1e-12)
    assert step.interval_s == pytest.approx(step.total_s, rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(model=_models, device=_names, shape=_shapes, prompts=_prompts, sequences=_sequences)
def test_terms_are_finite_and_the_interval_is_the_total_without_a_pipeline(
    model: str, device: str, shape: ParallelShape, prompts: list[int], sequences: int
) -> None:
    load = _load(prompts, sequences, 100 * sequences)
    step = _cost(model, device, shape).step(load)
    assert all(math.isfinite(term) and term >= 0 for term in step.terms().values())
    assert (step.total_s > 0) == (load.tokens > 0)
    if shape.pp == 1 or sequences:
        assert step.interval_s == pytest.approx(step.total_s)
    elif prompts:
        assert step.interval_s < step.total_s
    assert (step.collective_s > 0) == (shape.tp > 1 and load.tokens > 0)


@pytest.mark.parametrize("sequences", [1, 5, 8, 300])
def test_ranks_that_share_experts_decode_along_a_line_in_the_kv(sequences: int) -> None:
    cost = _cost("Mixtral-8x7B", _H100, ParallelShape(dp=8))
    base_s, per_kv_token_s = cost.decode_coefficients(sequences)
    step = cost.step(StepLoad.of_decode(sequences, 40_000))
    assert base_s + 40_000 * per_kv_token_s == pytest.approx(step.total_s, rel=1e-12)


def test_ranks_that_share_experts_read_each_expert_once_and_their_own_kv() -> None:
    """Eight ranks with 32 sequences each, against one rank that had room for the model with 32."""
    whole, rank = StepLoad.of_decode(256, 256_000), StepLoad.of_decode(32, 32_000)
    eight = _cost("Mixtral-8x7B", _H100, ParallelShape(dp=8), "none").step(whole)
    one = _cost("Mixtral-8x7B", _H100, ParallelShape(), "none").step(rank)
    assert eight.kv_read_s == pytest.approx(one.kv_read_s)
    assert eight.linear_s < 0.5 * one.linear_s
    assert eight.collective_s > 0
    assert one.collective_s == 0


def test_weights_in_fp8_are_read_and_multiplied_faster_where_the_device_can() -> None:
    shapes = [model_shape("Llama-3.1-8B", precision) for precision in (AS_STORED, Precision(weights="fp8"))]
    for device, least in ((_H100, 1.3), ("A100-80GB-SXM4", 0.99)):
        sources = [RooflineSource(shape, devices(), engine="none") for shape in shapes]
        costs = [source.cost_model(device, ParallelShape()) for source in sources]
        assert costs[0] is not None
        assert costs[1] is not None
        prompt, decode = StepLoad.of_prompts(8192), StepLoad.of_decode(1, 100)
        assert costs[0].step(prompt).linear_s > least * costs[1].step(prompt).linear_s
        assert costs[0].step(decode).linear_s > 1.4 * costs[1].step(decode).linear_s
        assert sources[1].kv_tokens(device, ParallelShape()) > sources[0].kv_tokens(device, ParallelShape())


def test_devices_that_share_their_hosts_links_have_less_of_them_each() -> None:
    model, load = published_models()["Llama-3.1-8B"], StepLoad.of_prompts(8192)
    source = RooflineSource(model, devices(), engine="none")
    pair, four = (source.cost_model("L40S", ParallelShape(tp)) for tp in (2, 4))
    assert pair is not None
    assert four is not None
    assert four.step(load).collective_s > 2 * pair.step(load).collective_s


def test_every_model_has_a_cost_on_every_device() -> None:
    for model in published_models().values():
        source = RooflineSource(model, devices())
        for name in devices():
            for shape in (ParallelShape(4), ParallelShape(2, 4)):
                cost = source.cost_model(name, shape)
                assert cost is not None
                assert 0 < cost.step(StepLoad.of_decode(1, 1)).total_s < cost.step(StepLoad.of_prompts(2000)).total_s


def test_a_pipeline_starts_prompts_more_often_but_does_not_finish_them_sooner() -> None:
    load = StepLoad.of_prompts(2048)
    one, four = (_cost("Llama-3.1-70B", _H100, ParallelShape(2, pp), "none").step(load) for pp in (1, 4))
    assert one.total_s < four.total_s < 1.1 * one.total_s
    assert four.interval_s == pytest.approx(four.total_s / 4, rel=0.1)


def test_pipelined_decode_is_a_round_of_micro_batches() -> None:
    """Weights are read once by each stage for each micro-batch: a round costs what one pass over all layers costs."""
    one = _cost("Llama-3.1-70B", _H100, ParallelShape(2, 1), "none").step(StepLoad.of_decode(16, 16_000))
    four = _cost("Llama-3.1-70B", _H100, ParallelShape(2, 4), "none").step(StepLoad.of_decode(64, 64_000))
    assert four.linear_s == pytest.approx(one.linear_s)
    assert four.kv_read_s == pytest.approx(one.kv_read_s)


def test_stages_on_different_nodes_communicate_through_the_nic() -> None:
    model = published_models()["Llama-3.1-70B"]
    whole, split = (
        RooflineSource(model, devices(), devices_per_node={_H100: size}).cost_model(_H100, ParallelShape(4, 2))
        for size in (8, 4)
    )
    assert whole is not None
    assert split is not None
    load = StepLoad.of_prompts(4096)
    assert split.step(load).pipeline_s > 2 * whole.step(load).pipeline_s
    too_small = RooflineSource(model, devices(), devices_per_node={_H100: 2})
    assert too_small.cost_model(_H100, ParallelShape(4)) is None  # tp stays inside a node
    assert too_small.kv_tokens(_H100, ParallelShape(4)) == 0
    no_network = RooflineSource(model, devices(), devices_per_node={"RTX4090": 4})
    assert no_network.cost_model("RTX4090", ParallelShape(4)) is not None
    assert no_network.cost_model("RTX4090", ParallelShape(4, 2)) is None


def test_illegal_shapes_and_unknown_devices_have_no_cost() -> None:
    source = RooflineSource(published_models()["Llama-3.1-8B"], {_H100: devices()[_H100]})
    assert source.cost_model(_H100, ParallelShape(3)) is None
    assert source.cost_model("L4", ParallelShape()) is None
    assert source.kv_tokens(_H100, ParallelShape(3)) == 0
    assert source.cost_model(_H100, ParallelShape()) is source.cost_model(_H100, ParallelShape())
    with pytest.raises(ConfigError, match="did you mean vllm"):
        RooflineSource(published_models()["Llama-3.1-8B"], devices(), engine="vlm")


def test_kv_fills_the_memory_that_weights_leave() -> None:
    source = RooflineSource(published_models()["Llama-3.1-8B"], devices())
    as_vllm = RooflineSource(published_models()["Llama-3.1-8B"], devices(), batch_tokens=2048, max_batch=256)
    assert as_vllm.kv_tokens("RTX4090", ParallelShape()) == pytest.approx(41_408, rel=0.08)  # vLLM 0.19 reported
    assert source.kv_tokens(_H100, ParallelShape(2)) > 2 * source.kv_tokens(_H100, ParallelShape())
    large = RooflineSource(published_models()["Llama-3.1-70B"], devices())
    assert large.kv_tokens(_H100, ParallelShape()) == 0
    assert large.kv_tokens(_H100, ParallelShape(4)) > 0
    assert 0 < source.error < 0.2


def test_a_batch_is_as_large_as_memory_allows() -> None:
    """As a user found it: 8B on an H100 was "held back by the largest batch, 252", with KV room for 740."""
    source = RooflineSource(published_models()["Llama-3.1-8B"], devices())
    cost, tokens = source.cost_model(_H100, ParallelShape()), source.kv_tokens(_H100, ParallelShape())
    assert cost is not None
    stream = RequestStream.make(np.arange(50.0), np.full(50, 400), np.full(50, 200))
    kind = phase_kind("decode", _H100, ParallelShape(), cost, tokens, stream)
    assert 700 < kind.max_batch <= tokens / 500 < kind.max_batch + 1
    limit = limit_of(kind, (SloClass(ttft_s=1, tpot_s=0.05),), stream)
    assert int(limit.reason.removeprefix("TPOT, ").removesuffix(" sequences")) > 500
    short = RequestStream.make(np.arange(50.0), np.full(50, 40), np.full(50, 20))
    assert phase_kind("decode", _H100, ParallelShape(), cost, tokens, short).max_batch == 1024
    few, many = (
        RooflineSource(published_models()["Llama-3.1-8B"], devices(), max_batch=batch).kv_tokens(_H100, ParallelShape())
        for batch in (1, 1024)
    )
    assert 0 < few - many < 0.03 * few, "logits of the batch take memory, too"


def test_prompts_beside_decoding_slow_its_attention_down() -> None:
    """On kernels that do both at once; measured on RTX cards."""
    cost = _cost("Llama-3.1-8B", "RTX4090", ParallelShape(), "none")
    alone = cost.step(StepLoad.of_decode(16, 64_000))
    beside = cost.step(_load([512], 16, 64_000))
    assert beside.kv_read_s > 1.2 * alone.kv_read_s
    assert beside.attention_s == cost.step(StepLoad.of_prompts(512)).attention_s


def test_two_kernels_do_not_slow_each_other_down() -> None:
    cost = _cost("Llama-3.1-8B", _H100, ParallelShape(), "none")
    assert cost.step(_load([512], 16, 64_000)).kv_read_s == cost.step(StepLoad.of_decode(16, 64_000)).kv_read_s


def test_a_later_chunk_expands_the_latents_before_it_anew() -> None:
    """Of latent attention; where keys and values are cached, chunks attend to no more than the whole prompt does."""
    whole = StepLoad.of_prompts(4096)
    half = StepLoad(
        prefill_tokens=2048, prefill_sequences=1, prefill_pairs=attention_pairs(2048, 2048), prefill_kv_tokens=4096
    )
    dense, latent = (_cost(model, _H100, ParallelShape(), "none") for model in ("Llama-3.1-8B", "DeepSeek-V2-Lite"))
    chunked_s = {
        cost: cost.step(StepLoad.of_prompts(2048)).attention_s + cost.step(half).attention_s for cost in (dense, latent)
    }
    assert chunked_s[dense] < 1.2 * dense.step(whole).attention_s
    expansion_s = 2.0 * 2048 * 512 * 16 * 256 / devices()[_H100].flops * 27  # at the device's peak, in all layers
    assert chunked_s[latent] > latent.step(whole).attention_s + expansion_s


def test_prompts_launch_more_than_decoding() -> None:
    eager = replace(engine_overhead("none"), eager_layer_s=1e-3, prompt_layer_s=1e-3, graph_decode=False)
    cost = RooflineCost(
        published_models()["Llama-3.1-8B"],
        devices()[_H100],
        ParallelShape(),
        efficiency("hopper"),
        eager,
        devices_per_node=1,
    )
    prompt, decode = cost.step(StepLoad.of_prompts(1)), cost.step(StepLoad.of_decode(1, 1))
    assert prompt.total_s - prompt.head_s == pytest.approx(32 * 2e-3)
    assert decode.total_s - decode.head_s == pytest.approx(32 * 1e-3, rel=0.01)


@pytest.mark.parametrize(("tp", "tokens", "is_congested"), [(2, 8192, False), (4, 1024, False), (4, 8192, True)])
def test_large_messages_of_more_than_a_pair_may_be_congested(tp: int, tokens: int, is_congested: bool) -> None:
    model = published_models()["Llama-2-70B"]
    congested = replace(engine_overhead("none"), free_bytes=1024 * 8192 * 2.0, congestion_s=1e-11)
    free, slow = (
        RooflineCost(
            model, devices()[_H100], ParallelShape(tp), efficiency("hopper"), overhead, devices_per_node=8
        ).step(StepLoad.of_prompts(tokens))
        for overhead in (engine_overhead("none"), congested)
    )
    extra_s = 160 * 7168 * 8192 * 2.0 * 1e-11 / 2 if is_congested else 0.0
    assert slow.collective_s - free.collective_s == pytest.approx(extra_s)


def test_engines_differ_in_their_overheads() -> None:
    load = StepLoad.of_decode(1, 500)
    free, graphs, eager = (
        _cost("Llama-2-70B", _H100, ParallelShape(8), engine).step(load)
        for engine in ("none", "vllm", "splitwise-h100")
    )
    assert free.overhead_s == 0
    assert 0 < graphs.overhead_s < 3e-3
    assert eager.total_s > 25e-3 > graphs.total_s  # Splitwise measured 30 ms: its CPU bounds it
    assert max(eager.terms(), key=eager.terms().__getitem__) == "overhead_s"


@pytest.mark.parametrize(
    ("model", "device", "tp", "engine", "load", "measured_s"),
    [
        # Splitwise, perf_model.csv (MIT): prompt_time_ms and token_time_ms
        ("Llama-2-70B", "A100-80GB-SXM4", 4, "splitwise-a100", StepLoad.of_prompts(1024), 0.2271),
        ("Llama-2-70B", "A100-80GB-SXM4", 4, "splitwise-a100", StepLoad.of_decode(16, 16 * 576), 0.0485),
        ("Llama-2-70B", _H100, 2, "splitwise-h100", StepLoad.of_prompts(2048), 0.3103),
        ("Llama-2-70B", _H100, 2, "splitwise-h100", StepLoad.of_decode(8, 8 * 576), 0.0404),
        # aiconfigurator, silicon_sample.csv (Apache-2.0): vLLM at 1024 tokens in, 1024 out, 32 at a time; prefills 5 %
        ("Qwen3-32B", _H100, 4, "vllm", StepLoad.of_decode(32, 32 * 1536), 0.0137),
    ],
)
def test_steps_are_near_what_was_measured(
    model: str, device: str, tp: int, engine: str, load: StepLoad, measured_s: float
) -> None:
    assert _cost(model, device, ParallelShape(tp), engine).step(load).total_s == pytest.approx(measured_s, rel=0.2)


def test_unmeasured_families_take_the_default() -> None:
    assert efficiency("cdna3") == efficiency("default")
    assert efficiency("cpu") != efficiency("default")


def test_slowed_kernels_reach_less_of_every_peak() -> None:
    fit: Efficiency = efficiency("hopper")
    slow = fit.slowed(2.0)
    assert slow.gemm.compute == fit.gemm.compute / 2
    assert slow.link.bandwidth == fit.link.bandwidth / 2
    assert slow.gemm.latency_s == fit.gemm.latency_s
