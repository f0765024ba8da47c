"""Deployments of which some instances serve one phase each, and some both."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from tandem.core.request_slo import RequestSlo
from tandem.core.slo import SloClass
from tandem.placement.evaluation.goodput import StopWhen, find_goodput
from tandem.placement.simulator import record as stages
from tandem.placement.simulator import simulate
from tandem.placement.simulator.deployment import Failure, NetworkSpec, RouterSpec
from tandem.placement.simulator.result import SimulationResult
from tandem.placement.workload.requests import RequestStream
from tandem.scheduling.budget import Mixing
from tandem.scheduling.routing_settings import RoutingPolicy, RoutingSettings
from tests.placement.simulator.deployments import deployment, poisson

_SLOW_NETWORK = NetworkSpec(1000.0, 1e7, 1e6, 0.002)


@given(
    prefill=st.integers(1, 2),
    decode=st.integers(1, 2),
    colocated=st.integers(1, 2),
    num_blocks=st.integers(18, 60),
    max_batch=st.integers(2, 12),
    rate=st.sampled_from([2.0, 20.0, 200.0]),
    seed=st.integers(0, 1000),
    lost=st.sampled_from([None, "p0", "d0", "c0"]),
    mixing=st.sampled_from(["chunked", "slack", "prompt_first"]),
    policy=st.sampled_from(["balanced", "goodput"]),
    same_node_only=st.booleans(),
    lease_s=st.sampled_from([math.inf, 0.05]),
)
@example(  # a step that goes on for longer than the lease, after the reader has acknowledged the KV
    prefill=1,
    decode=1,
    colocated=1,
    num_blocks=46,
    max_batch=7,
    rate=200.0,
    seed=154,
    lost="d0",
    mixing="chunked",
    policy="balanced",
    same_node_only=True,
    lease_s=0.05,
)
@example(  # KV comes to an instance with a full batch, on which a prompt waits
    prefill=1,
    decode=1,
    colocated=2,
    num_blocks=45,
    max_batch=2,
    rate=20.0,
    seed=2,
    lost="p0",
    mixing="chunked",
    policy="goodput",
    same_node_only=False,
    lease_s=math.inf,
)
@settings(
    max_examples=30, deadline=None, phases=[Phase.explicit, Phase.generate]
)  # shrinking simulations takes minutes
def test_no_request_is_lost_and_every_run_is_the_same(
    prefill: int,
    decode: int,
    colocated: int,
    num_blocks: int,
    max_batch: int,
    rate: float,
    seed: int,
    lost: str | None,
    mixing: Mixing,
    policy: RoutingPolicy,
    same_node_only: bool,
    lease_s: float,
) -> None:
    spec = deployment(
        prefill,
        decode,
        colocated=colocated,
        num_blocks=num_blocks,
        max_batch=max_batch,
        network=_SLOW_NETWORK,
        router=RouterSpec(
            0.003,
            0.001,
            0.002,
            same_node_only=same_node_only,
            slo=(RequestSlo("a", 0.2, 0.03),),
            routing=RoutingSettings(policy=policy),
        ),
        nodes=2 if min(prefill, decode) > 1 else 1,
    )
    spec = replace(
        spec, instances=tuple(replace(instance, policy=mixing, lease_s=lease_s) for instance in spec.instances)
    )
    if lost is not None:
        spec = replace(spec, failures=(Failure(lost, 0.3123, 0.9),))
    stream = poisson(40, rate, output=40, seed=seed)
    first = simulate(spec, stream)  # which asserts that no instance keeps anything of a request
    assert first.finished.all()
    assert simulate(spec, stream).stamps.tobytes() == first.stamps.tobytes()
    plain = simulate(spec, stream, step_by_step=True)
    np.testing.assert_allclose(first.stamps, plain.stamps, rtol=1e-9)
    for one, other in zip(first.instances, plain.instances, strict=True):
        assert (one.prefill_tokens, one.decode_tokens) == (other.prefill_tokens, other.decode_tokens)
    if lost is None:
        tokens = sum(use.prefill_tokens + use.decode_tokens for use in first.instances)
        again = sum(use.preemptions for use in first.instances)
        expected = (stream.prompt_tokens + stream.output_tokens - 1).sum()
        assert tokens == expected if again == 0 else tokens > expected
    for timeline in first.timelines():
        assert sum(timeline.parts().values()) == pytest.approx(timeline.total_s)


def test_both_sorts_are_used_and_one_is_used_while_the_other_is_gone() -> None:
    stream = poisson(300, 30.0)
    spec = deployment(1, 1, colocated=1)
    assert all(use.decode_tokens > 0 for use in simulate(spec, stream).instances[1:])
    for gone in ("p0", "d0", "c0"):
        result = simulate(replace(spec, failures=(Failure(gone, 0.0),)), stream)
        assert result.finished.all()
        served = {use.instance_id for use in result.instances if use.decode_tokens > 0}
        assert served == ({"d0"} if gone == "c0" else {"c0"})


@pytest.mark.parametrize(
    ("slo", "prompt", "output"),
    [
        (SloClass(ttft_s=0.8, tpot_s=0.05), 1000, 40),  # the pair is bound by its prefill
        (SloClass(ttft_s=0.4, tpot_s=0.016), 100, 200),  # and here by its decode
    ],
)
def test_together_they_serve_what_they_serve_apart(slo: SloClass, prompt: int, output: int) -> None:
    """One pair, and one colocated instance on an equal device: the router knows queues and memory, and no speeds."""
    stream = poisson(400, 1.0, prompt=prompt, output=output)
    spec = deployment(colocated=1, num_blocks=8000, max_batch=128, max_batch_tokens=1024)

    def goodput(*roles: str) -> float:
        part = replace(spec, instances=tuple(one for one in spec.instances if one.role in roles))

        def run(requests: RequestStream, stop_when: StopWhen) -> SimulationResult:
            return simulate(part, requests, stop_when=stop_when)

        return find_goodput(run, stream, (slo,), guess=6.0, tolerance=0.03)

    pair, colocated = goodput("prefill", "decode"), goodput("colocated")
    assert colocated > 0.15 * pair, "it counts"
    assert goodput("prefill", "decode", "colocated") >= 0.88 * (pair + colocated)


def test_leases_that_are_renewed_change_nothing() -> None:
    """Decode has memory for one or two requests: KV waits for it much longer than a lease."""
    stream = poisson(60, 50.0, fixed=True)
    runs = []
    for lease_s in (math.inf, 0.1):
        spec = deployment(num_blocks=1000)
        small = {"prefill": 1000, "decode": 20}
        instances = (
            replace(each, lease_s=lease_s, num_blocks=small[each.role], max_model_len=200) for each in spec.instances
        )
        runs.append(simulate(replace(spec, instances=tuple(instances)), stream))
    waited_s = runs[0].stamps[:, stages.TRANSFER_STARTED] - runs[0].stamps[:, stages.FIRST_TOKEN]
    assert waited_s.max() > 1.0, "nothing had to wait"
    assert runs[1].finished.all()
    np.testing.assert_array_equal(runs[0].stamps, runs[1].stamps)
