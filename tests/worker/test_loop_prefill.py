"""The loop of an instance that prefills for others, turned by hand."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tandem.core.attempt_id import AttemptId
from tandem.core.clock import ManualClock
from tandem.core.request import FinishReason, GenerationRequest, SamplingParams
from tandem.core.session import PrefillFinished, PrefillStarted, RequestFailed, Role, Submit
from tandem.core.transfer import hash_token_ids
from tandem.prefill_worker.held_kv import KvComputing, KvReady
from tandem.scheduling.budget import role_budget
from tandem.worker.loop import MAX_FAILED_STEPS, InstanceLoop
from tandem.worker.loop_messages import Release, SendEvent, SubmitAttempt
from tests.fakes import EOS, LAYOUT, FakeEngine, next_token
from tests.worker.loop_turn import turn, turn_with_progress

PROMPT = tuple(range(1, 11))


def make(
    engine: FakeEngine,
    clock: ManualClock | None = None,
    *,
    max_queue: int = 100,
    prefix_cache: bool = False,
    layer_computed: Callable[[int], None] | None = None,
) -> InstanceLoop:
    budget = role_budget(Role.PREFILL, max_batch=64, max_batch_tokens=16, max_queue=max_queue)
    return InstanceLoop(
        engine,  # type: ignore[arg-type]
        budget,
        clock or ManualClock(),
        prefix_cache=prefix_cache,
        layer_computed=layer_computed,
    )


def submit(
    handle: int, token_ids: tuple[int, ...] = PROMPT, deadline_s: float = 100.0, **sampling: Any
) -> SubmitAttempt:
    params = SamplingParams(**({"max_tokens": 5} | sampling))
    request = GenerationRequest(f"r{handle}", token_ids, params, deadline_s=deadline_s)
    return SubmitAttempt(AttemptId(0, handle), Submit(handle, request, hand_over=True))


def test_a_prompt_is_computed_and_held_until_released() -> None:
    clock = ManualClock()
    loop = make(FakeEngine(before_step=lambda: clock.advance(0.5)), clock)
    loop.apply(submit(1))
    clock.advance(0.25)
    started, finished, hold = turn(loop)
    assert started == SendEvent(0, PrefillStarted(1, 0))
    assert isinstance(finished, SendEvent)
    event = finished.event
    assert isinstance(event, PrefillFinished)
    assert event.token.token_id == next_token(PROMPT, 10)
    assert (event.finish_reason, event.compute_s) == (None, 0.5)
    assert isinstance(hold, KvReady)
    manifest = hold.manifest
    manifest.check(request_id="r1", epoch=0, token_ids=PROMPT, fingerprint=LAYOUT.fingerprint)
    assert manifest.token_hash == hash_token_ids(PROMPT)
    assert len(manifest.block_ids) == 3
    loop.idle()
    assert loop.report.blocks.leased == 3
    loop.apply(Release(AttemptId(0, 1)))
    assert turn(loop) == []
    assert loop.report.blocks.free == LAYOUT.num_blocks


def test_long_prompts_go_in_chunks_and_are_packed_with_others() -> None:
    engine = FakeEngine()
    loop = make(engine)
    loop.apply(submit(1, tuple(range(1, 31))))
    loop.apply(submit(2))
    events = [event for _ in range(3) for event in turn(loop)]
    assert [[len(part.token_ids) for part in step] for step in engine.steps] == [[16], [14, 2], [8]]
    assert [type(event.event).__name__ for event in events if isinstance(event, SendEvent)] == [
        "PrefillStarted",
        "PrefillStarted",
        "PrefillFinished",
        "PrefillFinished",
    ]


def test_readers_learn_what_is_computed_chunk_by_chunk_and_layer_by_layer() -> None:
    layers: list[int] = []
    loop = make(FakeEngine(), prefix_cache=True, layer_computed=layers.append)
    prompt = tuple(range(1, 31))  # eight blocks of four tokens, the last one not quite
    loop.apply(submit(1, prompt))
    first, second = ([event for event in turn_with_progress(loop) if isinstance(event, KvComputing)] for _ in range(2))
    loop.apply(submit(2, prompt))
    third = [event for event in turn_with_progress(loop) if isinstance(event, KvComputing)]
    seen = [(event.is_first, event.blocks, event.next_blocks) for event in (*first, *second, *third)]
    assert seen == [(True, 0, 4), (False, 4, 8), (True, 7, 8)]  # the third is cached but for its last block
    assert [len(event.block_ids) for event in (*first, *third)] == [8, 8]
    assert first[0].block_ids == second[0].block_ids
    assert layers == [1, 2] * 3


def test_an_answer_of_one_token_holds_nothing() -> None:
    for engine, sampling, reason in (
        (FakeEngine(), {"max_tokens": 1}, FinishReason.LENGTH),
        (FakeEngine(draw=lambda *_: EOS), {}, FinishReason.STOP),
    ):
        loop = make(engine)
        loop.apply(submit(1, **sampling))
        _, finished = turn(loop)
        assert isinstance(finished, SendEvent)
        assert isinstance(finished.event, PrefillFinished)
        assert finished.event.finish_reason is reason
        assert turn(loop) == []
        assert loop.report.blocks.free == LAYOUT.num_blocks


def test_release_in_every_phase_frees_everything() -> None:
    loop = make(FakeEngine())
    loop.apply(submit(1, tuple(range(1, 31))))  # will be between two chunks
    turn(loop)
    loop.apply(submit(2))  # waiting
    loop.apply(Release(AttemptId(0, 1)))
    loop.apply(Release(AttemptId(0, 2)))
    loop.apply(Release(AttemptId(0, 3)))  # unknown
    assert turn(loop) == []
    assert loop.report.blocks.free == LAYOUT.num_blocks


def test_a_failed_step_fails_its_requests_and_the_next_one_works() -> None:
    def out_of_memory() -> None:
        raise RuntimeError("out of memory")

    engine = FakeEngine(before_step=out_of_memory)
    loop = make(engine)
    loop.apply(submit(1))
    _, failed = turn(loop)
    assert isinstance(failed, SendEvent)
    assert isinstance(failed.event, RequestFailed)
    assert failed.event.code == "unavailable"
    engine.before_step = lambda: None
    loop.apply(submit(2))
    assert len(turn(loop)) == 3


def test_an_engine_whose_steps_keep_failing_ends_the_loop() -> None:
    def broken() -> None:
        raise RuntimeError("an illegal memory access")

    loop = make(FakeEngine(before_step=broken))
    for handle in range(1, MAX_FAILED_STEPS):
        loop.apply(submit(handle))
        turn(loop)
    loop.apply(submit(MAX_FAILED_STEPS))
    with pytest.raises(RuntimeError, match="illegal"):
        turn(loop)


def test_unusable_numbers_do_not_stay_in_the_prefix_cache() -> None:
    engine = FakeEngine()
    loop = make(engine, prefix_cache=True)
    loop.apply(submit(1))
    turn(loop)
    loop.apply(Release(AttemptId(0, 1)))
    engine.broken_positions = {10}
    loop.apply(submit(2))
    turn(loop)
    engine.broken_positions = set()
    loop.apply(submit(3))
    started = next(e.event for e in turn(loop) if isinstance(e, SendEvent))
    assert started == PrefillStarted(3, 0), "the blocks of a broken answer were used again"


def test_a_request_with_unusable_logits_fails_alone() -> None:
    loop = make(FakeEngine(broken_positions={4}))
    loop.apply(submit(1, (1, 2, 3, 4)))
    loop.apply(submit(2))
    events = turn(loop)
    failed = [e.event for e in events if isinstance(e, SendEvent) and isinstance(e.event, RequestFailed)]
    assert [event.handle for event in failed] == [1]
    assert [e.attempt_id.handle for e in events if isinstance(e, KvReady)] == [2]


def test_a_passed_deadline_and_a_full_queue_are_reported() -> None:
    clock = ManualClock()
    loop = make(FakeEngine(), clock, max_queue=1)
    loop.apply(submit(1, deadline_s=1.0))
    loop.apply(submit(2))
    clock.advance(2.0)
    codes = [e.event.code for e in turn(loop) if isinstance(e, SendEvent) and isinstance(e.event, RequestFailed)]
    assert codes == ["overloaded", "deadline_exceeded"]


def test_tokens_that_the_model_does_not_have_never_reach_a_step() -> None:
    engine = FakeEngine()
    loop = make(engine)
    for handle, token_id in ((1, 100), (2, -1)):
        loop.apply(submit(handle, (5, token_id)))
    codes = [e.event.code for e in turn(loop) if isinstance(e, SendEvent) and isinstance(e.event, RequestFailed)]
    assert codes == ["invalid_request", "invalid_request"]
    assert engine.steps == []


def test_prompt_logprobs_cover_the_prompt_over_chunks_and_skip_the_cache() -> None:
    loop = make(FakeEngine(), prefix_cache=True)
    prompt = tuple(range(1, 31))
    for handle in (1, 2):
        loop.apply(submit(handle, prompt, prompt_logprobs=0))
        events = [event for _ in range(2) for event in turn(loop)]
        finished = next(e.event for e in events if isinstance(e, SendEvent) and isinstance(e.event, PrefillFinished))
        assert finished.num_cached_tokens == 0
        assert finished.prompt_logprobs is not None
        assert [None if p is None else p.token_id for p in finished.prompt_logprobs] == [None, *prompt[1:]]


def test_a_repeated_prompt_comes_from_the_cache_of_its_tenant() -> None:
    loop = make(FakeEngine(), prefix_cache=True)
    cached = []
    for handle, salt in ((1, ""), (2, ""), (3, "other tenant")):
        command = submit(handle)
        request = replace(command.command.request, cache_salt=salt)
        loop.apply(SubmitAttempt(command.attempt_id, Submit(handle, request, hand_over=True)))
        events = turn(loop)
        cached += [
            e.event.num_cached_tokens
            for e in events
            if isinstance(e, SendEvent) and isinstance(e.event, PrefillStarted)
        ]
    assert cached == [0, 8, 0]
