from dataclasses import replace

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tandem.core.request_slo import RequestSlo
from tandem.core.timeline import Stage
from tandem.placement.simulator import Progress, simulate
from tandem.placement.simulator.deployment import Failure, NetworkSpec, RouterSpec
from tandem.placement.simulator.event_queue import EventQueue
from tandem.placement.simulator.result import STAGES
from tandem.placement.workload.requests import RequestStream
from tandem.scheduling.budget import Mixing
from tandem.scheduling.routing_machine import RoutingPolicy, RoutingSettings
from tests.placement.simulator.deployments import LinearCost, deployment, poisson

_SLOW_NETWORK = NetworkSpec(1000.0, 1e7, 1e6, 0.002)


@pytest.mark.parametrize("policy", [None, "chunked", "prompt_first"])
def test_every_request_finishes_and_its_parts_sum_to_its_time(policy: Mixing | None) -> None:
    stream = poisson(300, 8.0)
    router = RouterSpec(0.003, 0.001, 0.002)
    result = simulate(deployment(2, 2, network=_SLOW_NETWORK, router=router, policy=policy), stream)
    assert result.finished.all()
    assert sum(use.prefill_tokens for use in result.instances) == stream.prompt_tokens.sum()
    assert sum(use.decode_tokens for use in result.instances) == (stream.output_tokens - 1).sum()
    for timeline, output_tokens in zip(result.timelines(), stream.output_tokens, strict=True):
        assert sum(timeline.parts().values()) == pytest.approx(timeline.total_s)
        assert (Stage.SECOND_TOKEN in timeline.stamps) == (output_tokens > 1)


def test_two_runs_are_equal_bit_for_bit() -> None:
    spec, stream = deployment(2, 3, network=_SLOW_NETWORK, num_blocks=60), poisson(300, 20.0)
    assert simulate(spec, stream).stamps.tobytes() == simulate(spec, stream).stamps.tobytes()


def test_without_work_to_do_only_the_router_takes_time() -> None:
    stream = RequestStream.make(np.arange(5.0), np.full(5, 100), np.full(5, 3))
    free = LinearCost(1e-12, 0.0, 0.0)
    result = simulate(deployment(cost=free, router=RouterSpec(0.25, 0.125, 0.5)), stream)
    assert result.ttft_s == pytest.approx(0.375)
    assert result.stage(Stage.FINISHED) - stream.arrival_s == pytest.approx(0.75)


def test_one_prefill_instance_is_an_m_d_1_queue() -> None:
    service_s, rate = 0.05, 12.0
    cost = LinearCost(fixed_s=0.0, token_s=0.0, prompt_s=service_s)
    stream = poisson(20_000, rate, prompt=64, output=1, fixed=True)
    result = simulate(deployment(cost=cost, max_batch_tokens=64, num_blocks=100_000), stream)
    expected_s = service_s + rate * service_s**2 / (2 * (1 - rate * service_s))
    batches = result.ttft_s.reshape(40, -1).mean(axis=1)  # long enough to be nearly independent
    assert abs(batches.mean() - expected_s) < 3 * batches.std(ddof=1) / np.sqrt(len(batches))


@pytest.mark.parametrize("policy", [None, "chunked"])
def test_a_lost_instance_loses_no_request(policy: Mixing | None) -> None:
    stream, attempts = poisson(400, 25.0, output=40), []
    for name in ("p0", "p1", "d0"):
        spec = deployment(2, 2, network=_SLOW_NETWORK, policy=policy)
        spec = replace(spec, failures=(Failure(name, 5.0, 9.0), Failure(name, 12.0)))
        result = simulate(spec, stream)
        assert result.finished.all()
        attempts.append(result.num_attempts.max())
        for timeline in result.timelines():
            assert sum(timeline.parts().values()) == pytest.approx(timeline.total_s)
    assert 1 < max(attempts) <= 3


def test_with_a_role_gone_requests_are_refused() -> None:
    stream = poisson(50, 10.0)
    spec = replace(deployment(), failures=(Failure("d0", 2.0),))
    result = simulate(spec, stream)
    assert not result.finished[stream.arrival_s > 2.0].any()
    assert result.finished.any()


@pytest.mark.parametrize("policy", [None, "chunked"])
@pytest.mark.parametrize("step_by_step", [False, True])
def test_a_deadline_ends_a_request_in_any_phase(policy: Mixing | None, step_by_step: bool) -> None:
    stream, router = poisson(300, 40.0, output=40), RouterSpec(request_timeout_s=0.6)
    spec = deployment(1, 1, network=_SLOW_NETWORK, router=router, policy=policy, num_blocks=60)
    spec = replace(spec, failures=(Failure("d0", 3.0, 5.0),))
    result = simulate(spec, stream, step_by_step=step_by_step)  # which asserts that no instance keeps anything
    taken_s = result.stage(Stage.FINISHED) - stream.arrival_s
    assert 0 < result.finished.sum() < len(stream)
    assert np.nanmax(taken_s) <= 0.6
    started = ~np.isnan(result.stage(Stage.FIRST_TOKEN))
    assert (started & ~result.finished).any(), "some had tokens already"
    spec = replace(spec, router=RouterSpec(request_timeout_s=600.0), failures=())
    result = simulate(spec, stream, step_by_step=step_by_step)
    assert result.finished.all()
    assert result.end_s < 60.0, "deadlines that are not needed any more take no time"


@pytest.mark.parametrize("step_by_step", [False, True])
def test_a_request_that_is_opened_makes_decodes_step_longer(step_by_step: bool) -> None:
    """The second is opened while the first decodes; when the first one is, nothing is under way."""
    stream = RequestStream.make(np.array([0.0, 0.2]), np.full(2, 100), np.array([60, 10]))
    free, slow = (
        simulate(deployment(request_admission_cost_s=request_admission_cost_s), stream, step_by_step=step_by_step)
        for request_admission_cost_s in (0.0, 0.005)
    )
    finished, admitted = STAGES.index(Stage.FINISHED), STAGES.index(Stage.DECODE_ADMITTED)
    assert slow.stamps[0, finished] == pytest.approx(free.stamps[0, finished] + 0.005)
    free_s, slow_s = (one.stamps[1, finished] - one.stamps[1, admitted] for one in (free, slow))
    assert slow_s == pytest.approx(free_s), "the second one's own steps take as long"
    assert slow.instances[1].cost_terms_s["overhead_s"] == pytest.approx(
        free.instances[1].cost_terms_s["overhead_s"] + 0.005
    )
    assert slow.instances[1].busy_s == pytest.approx(free.instances[1].busy_s + 0.005)


def test_prefills_first_step_after_a_pause_takes_longer() -> None:
    """The second comes while the first is computed, the third long after."""
    stream = RequestStream.make(np.array([0.0, 0.001, 1.0]), np.full(3, 100), np.full(3, 1))
    plain = deployment(cost=LinearCost(0.01, 1e-4, 0.0))
    woken = replace(plain, instances=tuple(replace(one, cold_step_factor=0.1) for one in plain.instances))
    usual, slow = simulate(plain, stream), simulate(woken, stream)
    step_s, first = 0.02, STAGES.index(Stage.FIRST_TOKEN)
    later_s = slow.stamps[:, first] - usual.stamps[:, first]
    assert later_s == pytest.approx([0.0, 0.0, 0.1 * step_s]), "at the start it has not paused yet"
    assert slow.instances[0].busy_s == pytest.approx(usual.instances[0].busy_s + 0.1 * step_s)


@given(
    prefill=st.integers(1, 3),
    decode=st.integers(1, 3),
    num_blocks=st.integers(14, 60),
    max_batch=st.integers(2, 12),
    horizon=st.sampled_from([0, 8, 64]),
    rate=st.sampled_from([2.0, 20.0, 200.0]),
    seed=st.integers(0, 1000),
    network=st.sampled_from([NetworkSpec(), _SLOW_NETWORK]),
    loses=st.booleans(),
    policy=st.sampled_from([None, None, "chunked", "chunked", "prompt_first", "padded"]),
    request_admission_cost_s=st.sampled_from([0.0, 0.0031]),
    max_batch_tokens=st.sampled_from([512, 24]),
    stages=st.sampled_from([1, 3]),
    prefix_cache=st.booleans(),
)
@settings(max_examples=40, deadline=None, phases=[Phase.generate])  # shrinking simulations takes minutes
def test_many_steps_at_once_give_the_same_as_each_alone(
    prefill: int,
    decode: int,
    num_blocks: int,
    max_batch: int,
    horizon: int,
    rate: float,
    seed: int,
    network: NetworkSpec,
    loses: bool,
    policy: Mixing | None,
    request_admission_cost_s: float,
    max_batch_tokens: int,
    stages: int,
    prefix_cache: bool,
) -> None:
    spec = deployment(
        prefill,
        decode,
        num_blocks=num_blocks,
        max_batch=max_batch,
        growth_horizon_tokens=horizon,
        network=network,
        nodes=2,
        policy=policy,
        request_admission_cost_s=request_admission_cost_s,
        max_batch_tokens=max_batch_tokens,
        cost=LinearCost(stages=stages, pair_s=1e-6),
        prefix_cache=prefix_cache,
    )
    if loses:
        spec = replace(spec, failures=(Failure("d0", 0.3123, 0.9), Failure("p0", 1.0456, 1.3)))
    stream = poisson(40, rate, output=40, seed=seed)
    if prefix_cache:
        stream = replace(
            stream, prefix_group=np.arange(40) % 3, prefix_tokens=np.minimum(stream.prompt_tokens, 30 + 40 * (seed % 3))
        )
    fast, plain = simulate(spec, stream), simulate(spec, stream, step_by_step=True)
    np.testing.assert_allclose(fast.stamps, plain.stamps, rtol=1e-9)
    np.testing.assert_array_equal(fast.num_attempts, plain.num_attempts)
    for one, other in zip(fast.instances, plain.instances, strict=True):
        if loses:  # a step that was lost may have taken blocks
            one = replace(one, peak_blocks=other.peak_blocks)
        assert replace(one, busy_s=0, cost_terms_s={}) == replace(other, busy_s=0, cost_terms_s={})
        assert one.busy_s == pytest.approx(other.busy_s)
        assert one.cost_terms_s == pytest.approx(other.cost_terms_s)
        if stages == 1:  # through a pipeline a step is busy with its first stage only
            assert sum(one.cost_terms_s.values()) == pytest.approx(one.busy_s)


@pytest.mark.parametrize("policy", [None, "chunked"])
def test_a_shared_prefix_is_computed_once_per_instance(policy: Mixing | None) -> None:
    n = 30
    stream = RequestStream.make(
        np.arange(n) * 1.0,
        np.full(n, 100),
        np.full(n, 4),
        prefix_group=np.arange(n) % 2,
        prefix_tokens=np.full(n, 80),
    )
    result = simulate(deployment(1, 0 if policy else 1, policy=policy, prefix_cache=True), stream)
    assert result.num_cached_tokens.tolist() == [0, 0] + [80] * (n - 2)
    assert result.instances[0].prefill_tokens == 200 + 20 * (n - 2)
    assert result.finished.all()


def test_shared_prefixes_draw_requests_to_where_they_are() -> None:
    n = 40
    stream = RequestStream.make(
        np.arange(n) * 0.5,
        np.full(n, 100),
        np.full(n, 4),
        prefix_group=np.arange(n) % 3,
        prefix_tokens=np.full(n, 80),
    )
    result = simulate(deployment(4, 1, prefix_cache=True), stream)
    assert (result.num_cached_tokens[3:] == 80).all()


def test_it_can_be_stopped() -> None:
    stream = poisson(2000, 50.0)
    seen: list[Progress] = []

    def stop(progress: Progress) -> bool:
        seen.append(progress)
        return progress.finished > 500

    result = simulate(deployment(), stream, stop_when=stop)
    assert result.stopped_early
    assert 500 < seen[-1].finished < 1500
    assert result.finished.sum() == seen[-1].finished
    cut = simulate(deployment(), stream, until_s=5.0)
    assert cut.end_s == 5.0
    assert not cut.stopped_early
    assert np.nanmax(cut.stage(Stage.RECEIVED)) < 5.0
    assert len(list(cut.timelines())) == (stream.arrival_s < 5.0).sum()


@pytest.mark.parametrize("policy", [None, "chunked"])
def test_a_long_prompts_chunks_are_a_few_events(policy: Mixing | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of 100 chunks; others arrive and decode meanwhile."""
    num_events, run_next = [0, 0], EventQueue.run_next

    def count(events: EventQueue) -> None:
        num_events[which] += 1
        run_next(events)

    monkeypatch.setattr(EventQueue, "run_next", count)
    stream, cost = poisson(40, 0.2, prompt=6400, output=40, fixed=True), LinearCost(pair_s=1e-8, stages=2)
    spec = deployment(1, 0 if policy else 1, cost=cost, policy=policy, num_blocks=40_000, max_batch_tokens=64)
    runs = []
    for which in (0, 1):
        runs.append(simulate(spec, stream, step_by_step=bool(which)))
    np.testing.assert_allclose(runs[0].stamps, runs[1].stamps, rtol=1e-9)
    assert num_events[0] < num_events[1] / 8


def test_a_pipeline_takes_the_next_prompt_before_it_has_the_first_token_of_the_last() -> None:
    cost = LinearCost(fixed_s=0.0, token_s=0.001, stages=4)
    stream = RequestStream.make(np.zeros(3), np.full(3, 400), np.ones(3))
    result = simulate(deployment(cost=cost, max_batch_tokens=400), stream)
    assert result.stage(Stage.PREFILL_STARTED) == pytest.approx([0.0, 0.1, 0.2])
    assert result.ttft_s == pytest.approx([0.4, 0.5, 0.6])


def test_in_a_closed_loop_the_next_request_comes_when_one_has_ended() -> None:
    """As many as asked for are under way until the last have begun, and by Little's law their times give the rate."""
    requests = poisson(400, 1.0, fixed=True)
    result = simulate(deployment(0, 0, colocated=1, policy="chunked"), requests, concurrency=8)
    received_s, finished_s = result.stage(Stage.RECEIVED), result.stage(Stage.FINISHED)
    ends_s = np.sort(finished_s)
    np.testing.assert_array_equal(received_s[:8], 0)
    np.testing.assert_allclose(received_s[8:], ends_s[: len(requests) - 8])
    rate = 300 / (ends_s[349] - ends_s[49])
    assert rate * float(np.mean((finished_s - received_s)[50:350])) == pytest.approx(8, rel=0.03)


@given(
    decode=st.integers(1, 2),
    colocated=st.integers(0, 1),
    num_blocks=st.integers(40, 200),
    rate=st.sampled_from([10.0, 40.0]),
    credit=st.sampled_from([300, 2048]),
    policy=st.sampled_from(["balanced", "goodput"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.generate])
def test_requests_that_wait_for_credit_leave_nothing_behind(
    decode: int, colocated: int, num_blocks: int, rate: float, credit: int, policy: RoutingPolicy, seed: int
) -> None:
    """Between two steps of an instance the router may send it the next prompt, because of what has just ended there."""
    router = RouterSpec(
        0.003,
        0.001,
        0.002,
        slo=(RequestSlo("a", 0.5, 0.03),),
        routing=RoutingSettings(policy=policy, max_outstanding_tokens=credit),
    )
    spec = deployment(1, decode, colocated=colocated, num_blocks=num_blocks, network=_SLOW_NETWORK, router=router)
    stream = poisson(120, rate, prompt=150, output=40, seed=seed)
    first = simulate(spec, stream)  # which asserts that no instance keeps anything of a request
    plain = simulate(spec, stream, step_by_step=True)
    np.testing.assert_allclose(first.stamps, plain.stamps, rtol=1e-9)
