import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.errors import ContextLengthError, OverloadedError
from tandem.core.request import GenerationRequest, SamplingParams
from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.budget import Mixing, StepBudget
from tandem.scheduling.chunk import Chunk
from tandem.scheduling.fast_forward_scheduler import FastForwardScheduler
from tandem.scheduling.prefix_index import PrefixIndex
from tandem.scheduling.sequence import Sequence, SequenceState

_BLOCK_SIZE = 4
_TOKEN = 0


class Worker:
    """An instance without an engine that serves both phases, in which every drawn token is 0. `ended_at[name]` is the
    number of steps after which it had its last token."""

    def __init__(self, num_blocks: int, budget: StepBudget, caching: bool = True) -> None:
        self.pool = BlockPool(num_blocks)
        self.index = PrefixIndex(self.pool, _BLOCK_SIZE, caching)
        self.scheduler = FastForwardScheduler(budget, self.pool, self.index, max_model_len=200)
        self.sequences: list[Sequence] = []
        self.steps = 0
        self.ended_at: dict[str, int] = {}

    def add(
        self, name: str, num_tokens: int, max_tokens: int = 50, token: int = 1, deadline_s: float = float("inf")
    ) -> Sequence:
        request = GenerationRequest(
            name, (token,) * num_tokens, SamplingParams(max_tokens=max_tokens), deadline_s=deadline_s
        )
        sequence = Sequence(name, request, arrival_s=0.0)
        self.scheduler.add(sequence)
        self.sequences.append(sequence)
        return sequence

    def step(self) -> list[Chunk]:
        chunks = self.scheduler.next_batch(float(self.steps))
        self.steps += 1
        for chunk in chunks:
            assert len(chunk.sequence.block_table) * _BLOCK_SIZE >= chunk.start + chunk.num_tokens
            assert self.scheduler.computed(chunk)
            if chunk.samples:
                self.scheduler.generated(chunk.sequence.key, _TOKEN)
                self._finish_if_done(chunk.sequence)
        return chunks

    def skip(self, num_steps: int) -> None:
        """As many steps at once, in which everybody decodes."""
        ended = self.scheduler.advance(num_steps)
        self.steps += num_steps
        for sequence in ended:
            self.scheduler.finish(sequence.key)
            self.ended_at[str(sequence.key)] = self.steps

    def max_steps(self) -> int:
        """Steps that can be skipped."""
        steps = self.scheduler.fast_forward()
        return 0 if steps is None else steps.max_steps

    def _finish_if_done(self, sequence: Sequence) -> None:
        if sequence.finish_reason_after(_TOKEN, frozenset(), self.scheduler.max_model_len) is not None:
            self.scheduler.finish(sequence.key)
            self.ended_at[str(sequence.key)] = self.steps


def _budget(
    mixing: Mixing = "chunked", max_batch: int = 8, max_batch_tokens: int = 16, horizon: int = 0, watermark: float = 0.0
) -> StepBudget:
    return StepBudget(max_batch, max_batch_tokens, max_batch_tokens, 8, mixing, horizon, watermark)


def _shown(chunks: list[Chunk]) -> list[tuple[object, int, int, bool, bool]]:
    return [(chunk.sequence.key, chunk.start, chunk.num_tokens, chunk.samples, chunk.is_prompt) for chunk in chunks]


def test_chunked_decodes_first_and_fills_the_step_with_prompts() -> None:
    worker = Worker(40, _budget(max_batch_tokens=10))
    worker.add("a", 4, token=1)
    assert _shown(worker.step()) == [("a", 0, 4, True, True)]
    worker.add("b", 15, token=2)
    worker.add("c", 6, token=3)
    assert _shown(worker.step()) == [("a", 4, 1, True, False), ("b", 0, 9, False, True)]
    assert _shown(worker.step()) == [("a", 5, 1, True, False), ("b", 9, 6, True, True), ("c", 0, 3, False, True)]
    assert _shown(worker.step()) == [
        ("a", 6, 1, True, False),
        ("b", 15, 1, True, False),
        ("c", 3, 3, True, True),
    ]


def test_prompt_first_stalls_decoding_for_whole_prompts() -> None:
    worker = Worker(40, _budget("prompt_first", max_batch_tokens=10))
    worker.add("a", 4, token=1)
    worker.step()
    worker.add("b", 5, token=2)
    worker.add("c", 5, token=3)
    worker.add("long", 30, token=4)
    assert _shown(worker.step()) == [("b", 0, 5, True, True), ("c", 0, 5, True, True)]
    assert _shown(worker.step()) == [("long", 0, 30, True, True)]
    assert _shown(worker.step()) == [
        ("a", 4, 1, True, False),
        ("b", 5, 1, True, False),
        ("c", 5, 1, True, False),
        ("long", 30, 1, True, False),
    ]


def test_a_prompt_is_admitted_when_its_blocks_and_the_watermark_are_there() -> None:
    worker = Worker(100, _budget(max_batch_tokens=400, watermark=0.05), caching=False)
    worker.add("a", 199, token=1)  # 50 blocks
    worker.add("b", 180, token=2)  # 45 blocks: 5 are left
    worker.add("c", 4, token=3)  # one block, which would leave 4
    assert [chunk.sequence.key for chunk in worker.step()] == ["a", "b"]


def test_the_watermark_does_not_apply_to_a_sequence_that_would_run_alone() -> None:
    worker = Worker(10, _budget(max_batch_tokens=40, watermark=0.5))
    worker.add("alone", 36)
    assert [chunk.sequence.key for chunk in worker.step()] == ["alone"]


def test_a_horizon_provides_for_growth() -> None:
    for horizon, admitted in ((0, ["a", "b"]), (8, ["a"])):
        worker = Worker(7, _budget(horizon=horizon))
        worker.add("a", 8, token=1)
        worker.add("b", 8, token=2)
        assert [chunk.sequence.key for chunk in worker.step()] == admitted


def test_out_of_memory_the_youngest_recomputes_before_new_sequences() -> None:
    worker = Worker(4, _budget(max_batch_tokens=20), caching=False)
    old, young = worker.add("old", 8, max_tokens=5, token=1), worker.add("young", 8, max_tokens=5, token=2)
    worker.step()
    late = worker.add("late", 2, token=3)
    assert _shown(worker.step()) == [("old", 8, 1, True, False)]
    assert (young.state, young.block_table) == (SequenceState.PREEMPTED, [])
    assert (worker.scheduler.counts().preempted, worker.scheduler.counts().waiting) == (1, 1)
    while old.state is SequenceState.RUNNING:
        worker.step()
        assert late.state is SequenceState.WAITING
    assert _shown(worker.step())[0] == ("young", 0, 9, True, True)
    assert young.num_generated == 2


def test_an_equal_prefix_is_computed_once() -> None:
    worker = Worker(40, _budget(max_batch_tokens=50))
    worker.add("a", 12)
    worker.step()
    worker.add("b", 14)
    chunks = worker.step()
    assert _shown(chunks)[1] == ("b", 12, 2, True, True)
    assert worker.scheduler.counts().cached_tokens == 12
    worker.scheduler.check_integrity()


def test_newly_cached_blocks_may_let_the_first_prompt_fit() -> None:
    worker = Worker(6, _budget(max_batch_tokens=10))
    worker.add("a", 16)
    worker.step()
    worker.add("b", 17)
    assert _shown(worker.step()) == [("a", 10, 6, True, True)]  # b finds 2 of its 5 blocks cached, and 2 free
    assert _shown(worker.step()) == [("a", 16, 1, True, False), ("b", 16, 1, True, True)]


def test_full_queue_and_too_long_prompts_are_refused() -> None:
    worker = Worker(10, _budget())
    with pytest.raises(ContextLengthError):
        worker.add("long", 40)
    for i in range(8):
        worker.add(str(i), 1)
    with pytest.raises(OverloadedError):
        worker.add("one too many", 1)


def test_cancel_and_deadline_free_everything_in_any_state() -> None:
    worker = Worker(10, _budget(max_batch=2, max_batch_tokens=6), caching=False)
    for name, tokens in (("decoding", 4), ("prompt", 12), ("waiting", 4)):
        worker.add(name, tokens, deadline_s=5.0)
    worker.step()
    assert not worker.scheduler.expired(4.9)
    for sequence in worker.scheduler.expired(5.0):
        assert worker.scheduler.cancel(sequence.key) is sequence
        worker.scheduler.check_integrity()
    assert worker.scheduler.cancel("prompt") is None
    assert (len(worker.scheduler), worker.pool.num_free) == (0, 10)
    assert worker.scheduler.counts().uncomputed_tokens == 0


_WORKERS = st.tuples(
    st.integers(6, 30),
    st.builds(
        _budget,
        mixing=st.sampled_from(["chunked", "prompt_first"]),
        max_batch=st.integers(1, 5),
        max_batch_tokens=st.integers(1, 20),
        horizon=st.sampled_from([0, 0, 6]),
        watermark=st.sampled_from([0.0, 0.1]),
    ),
    st.booleans(),
)
# (steps before it is added, prompt tokens, max_tokens, token): equal tokens share a prefix
_ARRIVALS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(1, 20), st.integers(1, 40), st.integers(1, 3)), min_size=1, max_size=8
)


@settings(deadline=None, max_examples=150)
@given(_WORKERS, _ARRIVALS, st.data())
def test_every_sequence_ends_and_every_step_keeps_the_budget(
    worker_args: tuple[int, StepBudget, bool], arrivals: list[tuple[int, int, int, int]], data: st.DataObject
) -> None:
    worker = Worker(*worker_args)
    scheduler, budget = worker.scheduler, worker_args[1]
    added: list[Sequence] = []
    cancelled = data.draw(st.sets(st.integers(0, len(arrivals) - 1)))
    for number, (pause, num_tokens, max_tokens, token) in enumerate(arrivals):
        added.append(worker.add(str(number), num_tokens, max_tokens, token))
        for _ in range(pause):
            _checked_step(worker, budget)
        if number in cancelled:
            scheduler.cancel(str(number))
    for _ in range(2000):
        if not len(scheduler):
            break
        _checked_step(worker, budget)
    assert not len(scheduler), "a sequence never ended"
    assert worker.pool.num_held == 0
    assert scheduler.counts().uncomputed_tokens == 0
    for number, sequence in enumerate(added):
        assert sequence.state is SequenceState.FINISHED
        if number not in cancelled:
            assert sequence.num_generated == min(
                sequence.request.sampling.max_tokens, scheduler.max_model_len - len(sequence.request.token_ids)
            )


def _checked_step(worker: Worker, budget: StepBudget) -> None:
    scheduler = worker.scheduler
    before, computed = scheduler.counts(), scheduler.counts().computed_tokens
    chunks = worker.step()
    after = scheduler.counts()
    scheduler.check_integrity()
    assert bool(chunks) == bool(before.waiting + before.preempted + before.prompts + before.decoding)
    assert after.computed_tokens - computed == sum(chunk.num_tokens for chunk in chunks)
    assert len({chunk.sequence.key for chunk in chunks}) == len(chunks)
    assert len(chunks) <= budget.max_batch
    prompts = [chunk for chunk in chunks if chunk.is_prompt]
    num_tokens = sum(chunk.num_tokens for chunk in chunks)
    if budget.mixing == "chunked":
        assert num_tokens <= budget.max_batch_tokens
        preempted = after.preemptions - before.preemptions
        assert len(chunks) - len(prompts) >= before.decoding - preempted, "a prompt stalled decoding"
    else:
        assert all(chunk.samples for chunk in prompts), "a prompt was cut"
        assert prompts in ([], chunks), "a step of prompts and decoding"
        if prompts:
            assert num_tokens <= budget.max_batch_tokens or len(prompts) == 1


def test_fast_forward_ends_at_the_first_finished_sequence_or_the_last_block() -> None:
    worker = Worker(10, _budget(), caching=False)
    worker.add("a", 4, max_tokens=9)
    assert worker.max_steps() == 0
    worker.step()
    assert worker.max_steps() == 8
    worker.add("b", 4, max_tokens=30)
    assert worker.max_steps() == 0
    worker.step()
    assert worker.max_steps() == 7
    worker.skip(7)
    assert worker.ended_at == {"a": 9}
    worker.add("c", 36, token=2)
    worker.step()  # finds no room for it
    assert worker.max_steps() == 21


def test_fast_forward_has_the_kv_tokens_and_the_newcomers() -> None:
    worker = Worker(40, _budget(max_batch_tokens=2))
    worker.add("a", 2, max_tokens=20)
    worker.step()
    worker.step()
    worker.add("b", 1, max_tokens=20, token=2)
    worker.step()
    worker.add("no tokens of a step are left for it", 1, token=3)
    steps = worker.scheduler.fast_forward()
    assert steps is not None
    assert (steps.max_steps, steps.num_sequences, steps.kv_tokens) == (17, 2, 5 + 2)
    assert [sequence.key for sequence in steps.newcomers] == ["b"]
    worker.skip(3)
    steps = worker.scheduler.fast_forward()
    assert steps is not None
    assert (steps.kv_tokens, steps.newcomers) == (13, [])


@settings(deadline=None, max_examples=150)
@given(_WORKERS, _ARRIVALS)
def test_many_steps_at_once_equal_single_steps(
    worker_args: tuple[int, StepBudget, bool], arrivals: list[tuple[int, int, int, int]]
) -> None:
    slow, fast = Worker(*worker_args), Worker(*worker_args)
    for number, (pause, *request) in enumerate(arrivals):
        for worker in (slow, fast):
            worker.add(str(number), *request)
        _run(slow, fast, pause)
    _run(slow, fast, 2000)
    assert slow.ended_at.keys() == {str(number) for number in range(len(arrivals))}


def _run(slow: Worker, fast: Worker, num_steps: int) -> None:
    """Both until they have made `num_steps` steps or are idle; `fast` skips where it can, half of the way at times."""
    while num_steps > 0 and len(fast.scheduler):
        steps = min(fast.max_steps(), num_steps)
        count = max(1, steps if num_steps % 2 else steps // 2)
        for _ in range(count):
            slow.step()
        if steps:
            fast.skip(count)
        else:
            fast.step()
        num_steps -= count
        assert _state(fast) == _state(slow)
        fast.scheduler.check_integrity()


def _state(worker: Worker) -> object:
    worker.scheduler.block_tables()  # brings the sequences up to date
    sequences = [
        (sequence.state, sequence.num_computed, tuple(sequence.token_ids), len(sequence.block_table))
        for sequence in worker.sequences
    ]
    pool, index = worker.pool, worker.index
    cache = (pool.num_free, pool.num_reclaimable, index.num_blocks)
    return worker.scheduler.counts(), sequences, cache, worker.ended_at
