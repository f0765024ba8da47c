"""The loop of an instance that decodes what others have prefilled, turned by hand. The test brings its transfers."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.attempt_id import AttemptId
from tandem.core.clock import ManualClock
from tandem.core.errors import CancelledError, TransferError
from tandem.core.request import FinishReason, GenerationRequest, SampledToken, SamplingParams
from tandem.core.session import KvReserved, KvSource, RequestFailed, Role, Submit, TokenFrame, TransferCommitted
from tandem.core.transfer import Transport
from tandem.decode_worker.fetcher import Fetch, FetchFailed, KvArrived
from tandem.scheduling.budget import role_budget
from tandem.worker.loop import InstanceLoop
from tandem.worker.loop_messages import CancelFetch, LoopEvent, Release, SendEvent, SubmitAttempt
from tests.fakes import EOS, LAYOUT, FakeEngine
from tests.worker.loop_turn import answer, tokens_after, turn

PROMPT = tuple(range(1, 11))
SOURCE = KvSource("prefill-1", "127.0.0.1:1")


def make(engine: FakeEngine, clock: ManualClock | None = None, *, max_batch: int = 64) -> InstanceLoop:
    budget = role_budget(Role.DECODE, max_batch=max_batch, max_queue=100)
    return InstanceLoop(engine, budget, clock or ManualClock(), prefix_cache=False)  # type: ignore[arg-type]


def submit(
    handle: int, token_ids: tuple[int, ...] = PROMPT, session: int = 0, deadline_s: float = 100.0, **sampling: Any
) -> SubmitAttempt:
    params = SamplingParams(**({"max_tokens": 4} | sampling))
    request = GenerationRequest(f"r{handle}", token_ids, params, deadline_s=deadline_s)
    return SubmitAttempt(AttemptId(session, handle), Submit(handle, request, SOURCE))


def arrived(handle: int, token_id: int = 50, session: int = 0) -> KvArrived:
    return KvArrived(AttemptId(session, handle), SampledToken(token_id), 0.1, 1000, Transport.SHARED_MEMORY, 0, 0.0)


def test_an_attempt_reserves_fetches_and_generates_to_the_end() -> None:
    loop = make(FakeEngine())
    loop.apply(submit(1))
    reserved, fetch = turn(loop)
    assert reserved == SendEvent(0, KvReserved(1))
    assert isinstance(fetch, Fetch)
    assert (fetch.token_ids, fetch.source, len(fetch.block_ids)) == (PROMPT, SOURCE, 3)
    assert turn(loop) == []  # nothing to compute while the KV is on its way
    loop.apply(arrived(1))
    events = [event for _ in range(4) for event in turn(loop)]
    assert events[0] == SendEvent(0, TransferCommitted(1, 0.1, 1000, "shared_memory"))
    assert answer(events, 1) == (tokens_after((*PROMPT, 50), 3), FinishReason.LENGTH)
    assert loop.report.blocks.free == LAYOUT.num_blocks


def test_one_frame_per_step_and_router() -> None:
    loop = make(FakeEngine())
    for handle, session in ((1, 0), (2, 0), (3, 7)):
        loop.apply(submit(handle, session=session))
    turn(loop)
    for handle, session in ((1, 0), (2, 0), (3, 7)):
        loop.apply(arrived(handle, session=session))
    frames = [event for event in turn(loop) if isinstance(event, SendEvent) and isinstance(event.event, TokenFrame)]
    assert [(frame.session_id, len(frame.event.items)) for frame in frames] == [(0, 2), (7, 1)]  # type: ignore[union-attr]


def test_end_of_sequence_ends_and_is_ignored_on_request() -> None:
    loop = make(FakeEngine(draw=lambda *_: EOS))
    loop.apply(submit(1))
    loop.apply(submit(2, ignore_eos=True))
    turn(loop)
    loop.apply(arrived(1))
    loop.apply(arrived(2))
    events = [event for _ in range(4) for event in turn(loop)]
    assert answer(events, 1) == ([EOS], FinishReason.STOP)
    assert answer(events, 2) == ([EOS] * 3, FinishReason.LENGTH)


def test_releasing_while_the_transfer_writes_keeps_the_blocks_until_it_has_left() -> None:
    for outcome in (arrived(1), FetchFailed(AttemptId(0, 1), CancelledError("cancelled"))):
        loop = make(FakeEngine())
        loop.apply(submit(1))
        turn(loop)
        loop.apply(Release(AttemptId(0, 1)))
        assert turn(loop) == [CancelFetch(AttemptId(0, 1))]
        assert loop.report.blocks.running == 3
        loop.apply(outcome)
        assert turn(loop) == []
        assert loop.report.blocks.free == LAYOUT.num_blocks


def test_releasing_in_the_other_phases_frees_at_once() -> None:
    loop = make(FakeEngine())
    loop.apply(submit(1))
    turn(loop)
    loop.apply(arrived(1))
    turn(loop)  # running
    loop.apply(submit(2))  # not yet reserved
    for handle in (1, 2, 3):
        loop.apply(Release(AttemptId(0, handle)))
    assert turn(loop) == []
    assert loop.report.blocks.free == LAYOUT.num_blocks


def test_a_failed_transfer_is_reported_and_frees_its_blocks() -> None:
    loop = make(FakeEngine())
    loop.apply(submit(1))
    turn(loop)
    loop.apply(FetchFailed(AttemptId(0, 1), TransferError("torn")))
    assert turn(loop) == [SendEvent(0, RequestFailed(1, "transfer_failed", "torn"))]
    assert loop.report.blocks.free == LAYOUT.num_blocks


def test_a_deadline_ends_an_attempt_in_every_phase() -> None:
    clock = ManualClock()
    loop = make(FakeEngine(), clock)
    loop.apply(submit(1, deadline_s=1.0))
    turn(loop)
    loop.apply(arrived(1))
    turn(loop)
    loop.apply(submit(2, deadline_s=1.0))
    turn(loop)  # reserved, transfer under way
    clock.advance(2.0)
    loop.apply(submit(3, deadline_s=1.5))
    events = turn(loop)
    failed = [e.event for e in events if isinstance(e, SendEvent) and isinstance(e.event, RequestFailed)]
    assert sorted((event.handle, event.code) for event in failed) == [(i, "deadline_exceeded") for i in (1, 2, 3)]
    assert CancelFetch(AttemptId(0, 2)) in events
    loop.apply(FetchFailed(AttemptId(0, 2), CancelledError("cancelled")))
    turn(loop)
    assert loop.report.blocks.free == LAYOUT.num_blocks


def test_a_failed_step_fails_its_requests_and_the_next_one_works() -> None:
    engine = FakeEngine()
    loop = make(engine)
    loop.apply(submit(1))
    turn(loop)
    loop.apply(arrived(1))

    def out_of_memory() -> None:
        raise RuntimeError("out of memory")

    engine.before_step = out_of_memory
    codes = [e.event.code for e in turn(loop) if isinstance(e, SendEvent) and isinstance(e.event, RequestFailed)]
    assert codes == ["unavailable"]
    engine.before_step = lambda: None
    loop.apply(submit(2))
    turn(loop)
    loop.apply(arrived(2))
    assert answer([event for _ in range(3) for event in turn(loop)], 2)[1] is FinishReason.LENGTH


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 24), st.integers(2, 38)), min_size=1, max_size=8), st.integers(1, 4))
def test_memory_pressure_changes_no_token(shapes: list[tuple[int, int]], max_batch: int) -> None:
    """Sequences that together need more memory than there is are preempted and recomputed; nobody can tell."""
    layout_blocks = 16
    layout = type(LAYOUT)(2, layout_blocks, 1, 4, 8, "float32", "fake")
    loop = make(FakeEngine(layout=layout), max_batch=max_batch)
    for handle, (num_prompt, max_tokens) in enumerate(shapes):
        loop.apply(submit(handle, tuple(range(1, num_prompt + 1)), max_tokens=max_tokens))
    events: list[LoopEvent] = []
    for _ in range(600):
        news = turn(loop)
        events += news
        for event in news:
            if isinstance(event, Fetch):
                loop.apply(arrived(event.attempt_id.handle))
    for handle, (num_prompt, max_tokens) in enumerate(shapes):
        prompt = tuple(range(1, num_prompt + 1))
        assert answer(events, handle) == (tokens_after((*prompt, 50), max_tokens - 1), FinishReason.LENGTH)
    assert loop.report.blocks.free == layout_blocks
