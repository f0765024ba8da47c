"""Layered prefill in the simulator: as many steps as chunks, weights once for each prompt."""

from bench.policies.layered import LayeredCost, LayeredLoad, LayeredScheduler, layered_load
from tandem.core.cost_model import StepLoad
from tandem.core.parallel import ParallelShape
from tandem.core.request import GenerationRequest, SamplingParams
from tandem.placement.costs.hardware import devices
from tandem.placement.costs.models import model_shape
from tandem.placement.costs.roofline import RooflineSource
from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.budget import StepBudget
from tandem.scheduling.prefix_index import PrefixIndex
from tandem.scheduling.sequence import Sequence


def test_the_steps_of_a_prompt_compute_each_layer_once_for_all_its_tokens() -> None:
    scheduler = LayeredScheduler(StepBudget(8, 512, 512, 8), pool := BlockPool(400), PrefixIndex(pool, 16), 4096)
    for name, num_tokens in (("a", 1200), ("b", 100)):
        request = GenerationRequest(name, (1,) * num_tokens, SamplingParams(max_tokens=1))
        scheduler.add(Sequence(name, request, arrival_s=0.0))
    shares, groups = dict[str, float](), list[list[str]]()
    while chunks := scheduler.next_batch(0.0):
        load = layered_load(chunks)
        assert isinstance(load, LayeredLoad)
        names = [str(chunk.sequence.key) for chunk in chunks]
        groups.append(names)
        shares["".join(names)] = shares.get("".join(names), 0.0) + load.of_layers
        for chunk in chunks:
            scheduler.computed(chunk)
            if chunk.samples:
                scheduler.generated(chunk.sequence.key, 0)
                scheduler.finish(chunk.sequence.key)
    assert groups == [["a"]] * 3 + [["b"]]  # 1,200 tokens in steps of 512; the second waits until the first is through
    assert shares == {"a": 1.0, "b": 1.0}


def test_a_share_of_the_layers_costs_that_share_of_a_prompt_and_all_of_decoding() -> None:
    plain = RooflineSource(model_shape("Qwen3-30B-A3B"), devices()).cost_model("H100-80GB-SXM5", ParallelShape(1, 1))
    assert plain is not None
    whole = StepLoad(1024, 1, 1024 * 1025 // 2, 1024, decode_sequences=4, decode_kv_tokens=4000, sampled=5)
    alone_s = plain.step(StepLoad.of_decode(4, 4000)).total_s
    load = LayeredLoad(256, 1, 0, 0, 4, 4000, 5, whole=whole, of_layers=0.25)
    cost = LayeredCost(plain).step(load)
    assert abs(cost.total_s - (alone_s + 0.25 * (plain.step(whole).total_s - alone_s))) < 1e-9
    chunk = StepLoad(256, 1, 256 * 1024, 1024, decode_sequences=4, decode_kv_tokens=4000, sampled=4)
    assert cost.total_s < plain.step(chunk).total_s  # a chunk reads nearly all experts of all layers
