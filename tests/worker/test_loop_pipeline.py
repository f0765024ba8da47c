"""The loop of an instance with pipeline stages, turned by hand: several steps are under way at once."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from tandem.core.attempt_id import AttemptId
from tandem.core.clock import ManualClock
from tandem.core.request import GenerationRequest, SampledToken, SamplingParams
from tandem.core.session import KvSource, Role, Submit
from tandem.core.transfer import Transport
from tandem.decode_worker.fetcher import Fetch, KvArrived
from tandem.engine.step import SequenceSlice, StepOutput
from tandem.scheduling.batch_composer import MIN_GROUP
from tandem.scheduling.budget import role_budget
from tandem.worker.loop import MAX_FAILED_STEPS, InstanceLoop
from tandem.worker.loop_messages import LoopEvent, Release, SubmitAttempt
from tests.fakes import LAYOUT, FakeEngine
from tests.worker.loop_turn import answer, tokens_after, turn


@dataclass
class PipelineEngine(FakeEngine):
    """`under_way` has the slices of each step that was launched and not collected."""

    num_stages: int = 2
    under_way: list[list[SequenceSlice]] = field(default_factory=list)
    fails_at_collect: bool = False

    def launch(self, slices: Sequence[SequenceSlice], layer_computed: object = None) -> StepOutput:
        assert len(self.under_way) < self.num_stages
        self.under_way.append(list(slices))
        return super().launch(slices)

    def collect(self, handle: StepOutput) -> StepOutput:
        self.under_way.pop(0)
        if self.fails_at_collect:
            raise RuntimeError("out of memory")
        return super().collect(handle)


def make(engine: FakeEngine, role: Role = Role.COLOCATED, **bounds: int) -> InstanceLoop:
    budget = role_budget(role, **({"max_batch": 8, "max_queue": 100} | bounds))
    return InstanceLoop(engine, budget, ManualClock(), prefix_cache=False)  # type: ignore[arg-type]


def prompt(handle: int, num_tokens: int) -> tuple[int, ...]:
    return tuple(1 + (handle + index) % 80 for index in range(num_tokens))


def submit(handle: int, num_prompt: int = 4, max_tokens: int = 8, kv: KvSource | None = None) -> SubmitAttempt:
    sampling = SamplingParams(max_tokens=max_tokens)
    request = GenerationRequest(f"r{handle}", prompt(handle, num_prompt), sampling, deadline_s=100.0)
    return SubmitAttempt(AttemptId(0, handle), Submit(handle, request, kv))


def expected(handle: int, num_prompt: int, count: int) -> list[int]:
    return tokens_after(prompt(handle, num_prompt), count)


def drawn_in(step: list[SequenceSlice]) -> set[int]:
    """Sequences that get a token from a step, named by their first block."""
    return {part.block_table[0] for part in step if part.sample is not None}


@pytest.mark.parametrize(("num_stages", "num_sequences"), [(2, 40), (3, 48), (2, 16)])
def test_each_stage_has_a_group_of_its_own(num_stages: int, num_sequences: int) -> None:
    """Of equal size; few sequences stay together."""
    layout = type(LAYOUT)(2, 600, 1, 4, 8, "float32", "fake")
    engine = PipelineEngine(num_stages=num_stages, layout=layout)
    loop = make(engine, max_batch=64)
    events: list[LoopEvent] = []
    for handle in range(num_sequences):
        loop.apply(submit(handle, max_tokens=40))
    sizes = set()
    for number in range(150):
        events += turn(loop)
        groups = [drawn_in(step) for step in engine.under_way]
        assert sum(map(len, groups)) == len(set().union(*groups)), "a sequence is in two steps at once"
        if 30 < number < 45:  # all decode, and have found their groups
            sizes.update(map(len, groups))
    assert sizes == {num_sequences if num_sequences <= MIN_GROUP else num_sequences // num_stages}
    answers = [answer(events, handle)[0] for handle in range(num_sequences)]
    assert answers == [expected(handle, 4, 40) for handle in range(num_sequences)]
    loop.idle()
    assert loop.report.is_empty
    assert loop.report.blocks.free == loop.report.blocks.total


def test_chunks_of_a_prompt_follow_each_other() -> None:
    engine = PipelineEngine()
    loop = make(engine, max_batch_tokens=16)
    loop.apply(submit(1, num_prompt=40, max_tokens=3))
    turn(loop)
    turn(loop)
    assert [(part.start, len(part.token_ids)) for step in engine.steps for part in step] == [(0, 8), (8, 8)]
    events = [event for _ in range(20) for event in turn(loop)]
    assert answer(events, 1)[0] == expected(1, 40, 3)


def test_blocks_of_a_step_under_way_are_not_reused() -> None:
    """Two sequences are given up while a step with them is under way. KV from elsewhere gets their blocks later."""
    layout = type(LAYOUT)(2, 8, 1, 4, 8, "float32", "fake")
    engine = PipelineEngine(layout=layout)
    loop = make(engine, Role.DECODE)
    for handle in range(2):
        loop.apply(submit(handle, num_prompt=12, max_tokens=4))
    turn(loop)
    under_way = {block_id for step in engine.under_way for part in step for block_id in part.block_table}
    assert len(under_way) == 6
    for handle in range(2):
        loop.apply(Release(AttemptId(0, handle)))
    loop.apply(submit(2, num_prompt=20, kv=KvSource("prefill-1", "127.0.0.1:1")))
    assert not any(isinstance(event, Fetch) for event in turn(loop)), "the step was still under way"
    (fetch,) = (event for event in turn(loop) if isinstance(event, Fetch))
    assert not engine.under_way
    loop.apply(KvArrived(fetch.attempt_id, SampledToken(50), 0.1, 1000, Transport.SHARED_MEMORY, 0, 0.0))
    events = [event for _ in range(20) for event in turn(loop)]
    assert len(answer(events, 2)[0]) == 7
    loop.idle()
    assert loop.report.blocks.free == loop.report.blocks.total


def test_a_transfer_waits_for_later_stages() -> None:
    """A chunk that draws no token is collected before later stages have computed it. What is under way is collected,
    too, before the engine settles."""

    @dataclass
    class Unsettled(PipelineEngine):
        is_settled: bool = False
        under_way_at_settle: list[int] = field(default_factory=list)

        def settle(self) -> None:
            self.under_way_at_settle.append(len(self.under_way))
            self.is_settled = True

    engine = Unsettled()
    loop = make(engine, Role.DECODE)
    loop.apply(submit(1, num_prompt=4, max_tokens=20))
    turn(loop)
    assert engine.under_way
    loop.apply(submit(2, kv=KvSource("prefill-1", "127.0.0.1:1")))
    assert any(isinstance(event, Fetch) for event in turn(loop))
    assert engine.under_way_at_settle == [0]


def test_steps_that_fail_one_after_another_free_everything() -> None:
    engine = PipelineEngine()
    loop = make(engine)
    for handle in range(4):
        loop.apply(submit(handle, max_tokens=20))
    for _ in range(6):
        turn(loop)
    engine.fails_at_collect = True
    for _ in range(MAX_FAILED_STEPS - 1):
        turn(loop)
    engine.fails_at_collect = False
    for _ in range(100):
        turn(loop)
    loop.idle()
    assert loop.report.is_empty
    assert loop.report.blocks.free == loop.report.blocks.total
