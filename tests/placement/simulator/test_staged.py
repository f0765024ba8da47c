"""Simulated instances with several steps under way: the same as the loop of a live instance, and nothing is lost."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tandem.core.attempt_id import AttemptId
from tandem.core.clock import ManualClock
from tandem.core.cost_model import StepCost, StepLoad, attention_pairs
from tandem.core.request import GenerationRequest, SamplingParams
from tandem.core.session import PrefillFinished, Role, Submit, TokenFrame
from tandem.core.timeline import Stage
from tandem.engine.step import SequenceSlice, StepOutput
from tandem.placement.simulator import simulate
from tandem.placement.simulator.deployment import Failure
from tandem.placement.workload.requests import RequestStream
from tandem.scheduling.budget import Mixing, role_budget
from tandem.worker.loop import InstanceLoop
from tandem.worker.loop_messages import SendEvent, SubmitAttempt
from tests.fakes import LAYOUT, FakeEngine
from tests.placement.simulator.deployments import LinearCost, deployment, poisson


class StagedCost(LinearCost):
    """A step leaves the first of `num_stages` stages after `share` of its time."""

    def __init__(self, num_stages: int, share: float, token_s: float = 1e-4) -> None:
        super().__init__(token_s=token_s, pair_s=1e-7)
        self.num_stages = num_stages
        self._share = share

    def one_step(self, load: StepLoad) -> StepCost:
        step = self.step(load)
        return replace(step, interval_s=self._share * step.total_s)


@dataclass
class TimedEngine(FakeEngine):
    """Steps take what `cost` says: the caller's stage until `launch` returns, all of them until `collect` does."""

    cost: StagedCost = field(default_factory=lambda: StagedCost(2, 0.5))
    clock: ManualClock = field(default_factory=ManualClock)
    ended_s: float = 0.0  # of the step that was launched last

    def launch(self, slices: Sequence[SequenceSlice], layer_computed: object = None) -> tuple[StepOutput, float]:  # type: ignore[override]
        step, now_s = self.cost.one_step(_load_of(slices)), self.clock.now_s()
        self.ended_s = max(now_s + step.total_s, self.ended_s + step.interval_s)
        self.clock.advance(step.interval_s)
        return super().launch(slices), self.ended_s

    def collect(self, handle: tuple[StepOutput, float]) -> StepOutput:  # type: ignore[override]
        output, ended_s = handle
        self.clock.advance(max(0.0, ended_s - self.clock.now_s()))
        return output


def _load_of(slices: Sequence[SequenceSlice]) -> StepLoad:
    prompts = [part for part in slices if part.sample is None or part.start < part.sample.num_prompt_tokens]
    decoding = [part for part in slices if part not in prompts]
    return StepLoad(
        prefill_tokens=sum(len(part.token_ids) for part in prompts),
        prefill_pairs=sum(attention_pairs(part.start, len(part.token_ids)) for part in prompts),
        decode_sequences=len(decoding),
        decode_kv_tokens=sum(part.start + 1 for part in decoding),
    )


def live_times(engine: TimedEngine, stream: RequestStream, max_batch_tokens: int) -> np.ndarray:
    """[n, 2]: when each request has its first and its last token from a loop that is turned as its thread turns it."""
    budget = role_budget(Role.COLOCATED, max_batch=64, max_queue=1000, max_batch_tokens=max_batch_tokens)
    loop = InstanceLoop(engine, budget, engine.clock, prefix_cache=False)  # type: ignore[arg-type]
    times, num_tokens = np.full((len(stream), 2), np.nan), [0] * len(stream)
    following = 0
    while np.isnan(times[:, 1]).any():
        if not loop.has_steps and loop.report.is_empty and following < len(stream):
            engine.clock.advance(max(0.0, float(stream.arrival_s[following]) - engine.clock.now_s()))
        while following < len(stream) and stream.arrival_s[following] <= engine.clock.now_s():
            sampling = SamplingParams(max_tokens=int(stream.output_tokens[following]), ignore_eos=True)
            prompt = tuple(1 + index % 80 for index in range(stream.prompt_tokens[following]))
            request = GenerationRequest(f"r{following}", prompt, sampling)
            loop.apply(SubmitAttempt(AttemptId(0, following), Submit(following, request)))
            following += 1
        busy = loop.prepare()
        if busy:
            loop.launch()
        if loop.is_full or not busy:
            loop.collect()
        if not loop.has_steps:
            loop.idle()
        for event in loop.take_events():
            if isinstance(event, SendEvent) and isinstance(event.event, PrefillFinished):
                handles = [event.event.handle]
            elif isinstance(event, SendEvent) and isinstance(event.event, TokenFrame):
                handles = [item.handle for item in event.event.items]
            else:
                continue
            for handle in handles:
                if num_tokens[handle] == 0:
                    times[handle, 0] = engine.clock.now_s()
                num_tokens[handle] += 1
                if num_tokens[handle] == stream.output_tokens[handle]:
                    times[handle, 1] = engine.clock.now_s()
    return times


@pytest.mark.parametrize("num_stages", [2, 3])
@pytest.mark.parametrize("rate", [0.5, 12.0, 200.0])  # one at a time; some together; more than fit one step
def test_steps_begin_and_end_when_those_of_a_live_loop_do(num_stages: int, rate: float) -> None:
    """Prompts in chunks that follow each other, beside one group of decoding sequences and several."""
    cost = StagedCost(num_stages, 1.2 / num_stages)
    stream = poisson(40, rate, prompt=120, output=30, seed=3)
    stream = replace(stream, prompt_tokens=np.maximum(stream.prompt_tokens, 2), output_tokens=stream.output_tokens + 1)
    spec = deployment(0, 0, colocated=1, cost=cost, max_batch_tokens=96, num_blocks=2000)
    simulated = simulate(spec, stream)
    layout = type(LAYOUT)(2, 2000, 1, 16, 8, "float32", "fake")
    engine = TimedEngine(layout=layout, max_model_len=4000, num_stages=num_stages, cost=cost, clock=ManualClock())
    live = live_times(engine, stream, 96)
    np.testing.assert_allclose(simulated.stage(Stage.FIRST_TOKEN), live[:, 0], rtol=1e-9)
    np.testing.assert_allclose(simulated.stage(Stage.FINISHED), live[:, 1], rtol=1e-9)


@given(
    prefill=st.integers(1, 2),
    decode=st.integers(1, 2),
    num_blocks=st.integers(18, 60),
    max_batch=st.sampled_from([4, 40]),
    rate=st.sampled_from([2.0, 20.0, 200.0]),
    seed=st.integers(0, 1000),
    mixing=st.sampled_from([None, "chunked", "slack", "prompt_first"]),
    num_stages=st.integers(2, 4),
    loses=st.booleans(),
    request_admission_cost_s=st.sampled_from([0.0, 0.0031]),
    prefix_cache=st.booleans(),
)
@settings(max_examples=8, deadline=None, phases=[Phase.generate])  # shrinking simulations takes minutes
def test_no_request_is_lost_and_steps_together_are_the_same_as_each_alone(
    prefill: int,
    decode: int,
    num_blocks: int,
    max_batch: int,
    rate: float,
    seed: int,
    mixing: Mixing | None,
    num_stages: int,
    loses: bool,
    request_admission_cost_s: float,
    prefix_cache: bool,
) -> None:
    spec = deployment(
        prefill,
        decode,
        num_blocks=num_blocks,
        max_batch=max_batch,
        max_batch_tokens=48,
        policy=mixing,
        cost=StagedCost(num_stages, 1.1 / num_stages),
        request_admission_cost_s=request_admission_cost_s,
        prefix_cache=prefix_cache,
    )
    if loses:
        spec = replace(spec, failures=(Failure("d0", 0.3123, 0.9), Failure("p0", 1.0456, 1.3)))
    stream = poisson(40, rate, output=40, seed=seed)
    fast, plain = simulate(spec, stream), simulate(spec, stream, step_by_step=True)
    assert loses or fast.finished.all()  # `simulate` asserts that no instance keeps anything of a request
    np.testing.assert_allclose(fast.stamps, plain.stamps, rtol=1e-9)
    for one, other in zip(fast.instances, plain.instances, strict=True):
        assert (one.prefill_tokens, one.decode_tokens) == (other.prefill_tokens, other.decode_tokens)
        assert one.busy_s == pytest.approx(other.busy_s)


def test_steps_in_every_stage_serve_more_than_one_at_a_time() -> None:
    stream = poisson(60, 1000.0, output=60, fixed=True)
    spec = deployment(0, 0, colocated=1, max_batch_tokens=512)
    finished_s = {}
    for share in (0.5, 1.0):
        instances = tuple(replace(one, cost=StagedCost(2, share, token_s=1e-3)) for one in spec.instances)
        finished_s[share] = simulate(replace(spec, instances=instances), stream).end_s
    assert finished_s[0.5] < 0.6 * finished_s[1.0]
