"""The loop of one instance that gets requests of every kind, turned by hand: prompts for others, KV from others, and
both phases here. The test brings the transfers."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.attempt_id import AttemptId
from tandem.core.clock import ManualClock
from tandem.core.errors import CancelledError
from tandem.core.request import FinishReason, GenerationRequest, SampledToken, SamplingParams
from tandem.core.session import KvSource, PrefillFinished, PrefillStarted, Role, Submit
from tandem.core.transfer import Transport
from tandem.decode_worker.fetcher import Fetch, FetchFailed, KvArrived
from tandem.prefill_worker.held_kv import KvReady
from tandem.scheduling.budget import Mixing, role_budget
from tandem.worker.loop import InstanceLoop
from tandem.worker.loop_messages import CancelFetch, LoopEvent, Release, SendEvent, SubmitAttempt
from tests.fakes import LAYOUT, FakeEngine
from tests.worker.loop_turn import answer, tokens_after, turn

SOURCE = KvSource("prefill-1", "127.0.0.1:1")
KINDS = ("hand_over", "remote", "both")


def make(
    role: Role,
    *,
    mixing: Mixing = "chunked",
    num_blocks: int = 32,
    num_stages: int = 1,
    growth_horizon_tokens: int | None = None,
    engine: FakeEngine | None = None,
) -> InstanceLoop:
    layout = type(LAYOUT)(2, num_blocks, 1, 4, 8, "float32", "fake")
    budget = role_budget(
        role,
        max_batch=4,
        max_batch_tokens=16,
        max_prefill_tokens=8,
        max_queue=100,
        mixing=mixing,
        growth_horizon_tokens=growth_horizon_tokens,
    )
    engine = engine or FakeEngine(layout=layout, num_stages=num_stages)
    return InstanceLoop(engine, budget, ManualClock(), prefix_cache=True)  # type: ignore[arg-type]


def submit(
    handle: int, num_prompt: int, max_tokens: int, kind: str = "both", prompt_logprobs: int | None = None
) -> SubmitAttempt:
    prompt = tuple(range(1, num_prompt + 1))
    sampling = SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
    request = GenerationRequest(f"r{handle}", prompt, sampling, deadline_s=100.0)
    kv = SOURCE if kind == "remote" else None
    return SubmitAttempt(AttemptId(0, handle), Submit(handle, request, kv, hand_over=kind == "hand_over"))


def arrived(handle: int) -> KvArrived:
    return KvArrived(AttemptId(0, handle), SampledToken(50), 0.1, 1000, Transport.SHARED_MEMORY, 0, 0.0)


def expected(num_prompt: int, first: int | None, count: int) -> list[int]:
    """What the fake engine generates after the prompt, or after `first` behind it."""
    return tokens_after([*range(1, num_prompt + 1), *([] if first is None else [first])], count)


def test_both_phases_of_a_request_on_one_instance() -> None:
    loop = make(Role.COLOCATED)
    loop.apply(submit(1, 12, 4))
    events = [event for _ in range(6) for event in turn(loop)]
    assert isinstance(events[0], SendEvent)
    assert events[0].event == PrefillStarted(1, 0)
    assert answer(events, 1) == (expected(12, None, 4), FinishReason.LENGTH)
    assert not any(isinstance(event, KvReady | Fetch) for event in events)
    loop.idle()
    assert loop.report.blocks.running == 0


def test_an_answer_of_one_token_ends_with_the_prompt() -> None:
    loop = make(Role.COLOCATED)
    loop.apply(submit(1, 6, 1))
    assert answer(turn(loop), 1) == (expected(6, None, 1), FinishReason.LENGTH)
    assert turn(loop) == []
    assert loop.report.blocks.running == 0


def test_a_decode_instance_computes_a_prompt_beside_those_that_it_decodes() -> None:
    engine = FakeEngine()
    loop = make(Role.DECODE, engine=engine)
    loop.apply(submit(1, 5, 20, "remote"))
    turn(loop)
    loop.apply(arrived(1))
    turn(loop)
    loop.apply(submit(2, 20, 3))
    events = [event for _ in range(30) for event in turn(loop)]
    assert [[len(part.token_ids) for part in step] for step in engine.steps[1:5]] == [[1, 8], [1, 8], [1, 4], [1, 1]]
    assert answer(events, 2) == (expected(20, None, 3), FinishReason.LENGTH)


def test_a_change_of_role_loses_no_token_of_what_runs() -> None:
    loop = make(Role.PREFILL)
    loop.apply(submit(1, 20, 6, "hand_over"))
    loop.apply(submit(2, 9, 6))
    events = turn(loop)
    loop.apply(role_budget(Role.DECODE, max_batch=1, max_queue=100, max_prefill_tokens=3))
    loop.apply(submit(3, 7, 5, "remote"))
    for _ in range(40):
        news = turn(loop)
        events += news
        for event in news:
            if isinstance(event, Fetch):
                loop.apply(arrived(event.attempt_id.handle))
            elif isinstance(event, KvReady):
                loop.apply(Release(event.attempt_id))
    assert answer(events, 1)[0] == expected(20, None, 1)
    assert answer(events, 2) == (expected(9, None, 6), FinishReason.LENGTH)
    assert answer(events, 3) == (expected(7, 50, 4), FinishReason.LENGTH)
    loop.idle()
    assert loop.report.blocks.running == loop.report.blocks.leased == 0


def scored_tokens(events: list[LoopEvent], handle: int) -> list[int | None]:
    """The prompt's tokens that have log-probabilities, None where there is none."""
    for event in events:
        match event:
            case SendEvent(_, PrefillFinished(handle=found, prompt_logprobs=logprobs)) if found == handle:
                return [None if each is None else each.token_id for each in logprobs or ()]
    return []


def test_a_prompt_that_is_preempted_has_its_log_probabilities_once() -> None:
    """The older request grows until the younger one, whose long prompt is computed in chunks, loses its blocks."""
    loop = make(Role.COLOCATED, num_blocks=8, growth_horizon_tokens=0)
    events: list[LoopEvent] = []
    loop.apply(submit(1, 15, 16))
    events += turn(loop)
    events += turn(loop)
    loop.apply(submit(2, 16, 1, prompt_logprobs=0))
    while answer(events, 2)[1] is None:
        events += turn(loop)
    assert scored_tokens(events, 2) == [None, *range(2, 17)]


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 24), st.integers(2, 30), st.sampled_from(KINDS)), min_size=1, max_size=8),
    role=st.sampled_from(list(Role)),
    mixing=st.sampled_from(["chunked", "prompt_first"]),
    num_stages=st.integers(1, 3),
    cancelled=st.sets(st.integers(0, 7)),
    pauses=st.lists(st.integers(0, 4), min_size=8, max_size=8),
    scored=st.sets(st.integers(0, 7)),
    growth_horizon_tokens=st.sampled_from([None, 0, 3]),
)
def test_any_mixture_under_memory_pressure_gives_every_request_its_tokens(
    shapes: list[tuple[int, int, str]],
    role: Role,
    mixing: Mixing,
    num_stages: int,
    cancelled: set[int],
    pauses: list[int],
    scored: set[int],
    growth_horizon_tokens: int | None,
) -> None:
    loop = make(role, mixing=mixing, num_blocks=16, num_stages=num_stages, growth_horizon_tokens=growth_horizon_tokens)
    events: list[LoopEvent] = []

    def rounds(count: int) -> None:
        for _ in range(count):
            news = turn(loop)
            events.extend(news)
            for event in news:
                match event:
                    case Fetch(attempt_id=attempt_id):
                        loop.apply(arrived(attempt_id.handle))
                    case CancelFetch(attempt_id):
                        loop.apply(FetchFailed(attempt_id, CancelledError("cancelled")))
                    case KvReady(attempt_id):
                        loop.apply(Release(attempt_id))

    for handle, (num_prompt, max_tokens, kind) in enumerate(shapes):
        loop.apply(submit(handle, num_prompt, max_tokens, kind, 0 if handle in scored else None))
        rounds(pauses[handle])
        if handle in cancelled:
            loop.apply(Release(AttemptId(0, handle)))
    rounds(800)
    for handle, (num_prompt, max_tokens, kind) in enumerate(shapes):
        if handle in cancelled:
            continue
        tokens, reason = answer(events, handle)
        if handle in scored and kind != "remote":
            assert scored_tokens(events, handle) == [None, *range(2, num_prompt + 1)]
        if kind == "hand_over":
            assert tokens == expected(num_prompt, None, 1)
        elif kind == "remote":
            assert (tokens, reason) == (expected(num_prompt, 50, max_tokens - 1), FinishReason.LENGTH)
        else:
            assert (tokens, reason) == (expected(num_prompt, None, max_tokens), FinishReason.LENGTH)
    loop.idle()
    blocks = loop.report.blocks
    assert blocks.free + blocks.cached == blocks.total
