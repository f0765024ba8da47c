from collections import Counter

import pytest

from tandem.core.errors import ContextLengthError, OverloadedError
from tandem.core.request import GenerationRequest, SamplingParams
from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.budget import StepBudget
from tandem.scheduling.prefix_index import PrefixIndex
from tandem.scheduling.scheduler import Scheduler
from tandem.scheduling.sequence import Sequence, SequenceState

_BLOCK_SIZE = 4


class Worker:
    """An instance without an engine that decodes what others have prefilled; every drawn token is 7."""

    def __init__(self, num_blocks: int, budget: StepBudget) -> None:
        self.pool = BlockPool(num_blocks)
        index = PrefixIndex(self.pool, _BLOCK_SIZE, enabled=False)
        self.scheduler = Scheduler(budget, self.pool, index, max_model_len=200)

    def add(self, name: str, num_tokens: int, max_tokens: int = 50, deadline_s: float = float("inf")) -> Sequence:
        sampling = SamplingParams(max_tokens=max_tokens)
        request = GenerationRequest(name, (1,) * num_tokens, sampling, deadline_s=deadline_s)
        sequence = Sequence(name, request, arrival_s=0.0, is_remote=True)
        self.scheduler.add(sequence)
        return sequence

    def reserve(self) -> list[object]:
        return [sequence.key for sequence in self.scheduler.reserve()]

    def admit(self) -> None:
        for key in self.reserve():
            assert isinstance(key, str)
            self.scheduler.committed(key, 7, 0.0)

    def step(self) -> list[tuple[object, int, int]]:
        chunks = self.scheduler.next_batch(0.0)
        for chunk in chunks:
            assert self.scheduler.computed(chunk)
            if chunk.samples:
                sequence = self.scheduler.generated(chunk.sequence.key, 7)
                if sequence.finish_reason_after(7, frozenset(), self.scheduler.max_model_len) is not None:
                    self.scheduler.finish(sequence.key)
        self.scheduler.check_integrity()
        return [(chunk.sequence.key, chunk.start, chunk.num_tokens) for chunk in chunks]


def _budget(max_batch: int = 8, max_queue: int = 8, growth_horizon_tokens: int = 8) -> StepBudget:
    return StepBudget(max_batch, max_batch + 6, 6, max_queue, growth_horizon_tokens=growth_horizon_tokens)


def test_one_token_each_per_step_until_the_last() -> None:
    worker = Worker(20, _budget())
    one, two = worker.add("a", 4, max_tokens=4), worker.add("b", 6, max_tokens=3)
    worker.admit()
    assert one.block_table
    assert worker.step() == [("a", 4, 1), ("b", 6, 1)]
    assert worker.step() == [("a", 5, 1), ("b", 7, 1)]
    assert two.state is SequenceState.FINISHED
    assert worker.step() == [("a", 6, 1)]
    assert one.num_generated == 4
    assert (len(worker.scheduler), worker.pool.num_free) == (0, 20)


def test_admission_counts_the_growth_of_all_and_keeps_the_order() -> None:
    worker = Worker(8, _budget(growth_horizon_tokens=8))
    worker.add("a", 8)  # claims 4 of 8 blocks: 8 tokens and 8 to come
    worker.add("b", 12)  # claims 5
    worker.add("c", 1)  # claims 3, would fit, must not pass
    assert worker.reserve() == ["a"]
    worker.scheduler.cancel("a")
    assert worker.reserve() == ["b", "c"]


def test_growth_is_limited_by_max_tokens() -> None:
    worker = Worker(4, _budget(growth_horizon_tokens=100))
    worker.add("a", 4, max_tokens=4)
    worker.add("b", 4, max_tokens=4)
    assert worker.reserve() == ["a", "b"]


def test_prompts_that_never_fit_and_a_full_queue_are_refused() -> None:
    worker = Worker(4, _budget(max_queue=1))
    assert worker.scheduler.max_model_len == 16
    with pytest.raises(ContextLengthError, match="has 16 tokens"):
        worker.add("long", 16)
    worker.add("a", 15)
    with pytest.raises(OverloadedError):
        worker.add("b", 1)


def test_the_youngest_is_preempted_and_recomputed_in_chunks_beside_the_others() -> None:
    worker = Worker(4, _budget(growth_horizon_tokens=0))
    old, young = worker.add("old", 7, max_tokens=4), worker.add("young", 7, max_tokens=5)
    worker.admit()
    assert worker.step() == [("old", 7, 1), ("young", 7, 1)]
    newcomer = worker.add("newcomer", 1, max_tokens=2)
    assert worker.step() == [("old", 8, 1)]
    assert (young.state, young.block_table) == (SequenceState.PREEMPTED, [])
    assert worker.scheduler.counts().preemptions == 1
    assert worker.reserve() == [], "a newcomer waits until the preempted one is back"
    assert worker.step() == [("old", 9, 1)]
    assert old.state is SequenceState.FINISHED
    assert worker.step() == [("young", 0, 6)]
    worker.admit()
    assert newcomer.state is SequenceState.RUNNING
    assert worker.step() == [("newcomer", 1, 1), ("young", 6, 3)]
    assert young.num_generated == 3


def test_sequences_take_turns_when_more_decode_than_fit_into_a_step() -> None:
    worker = Worker(100, _budget(max_batch=3, growth_horizon_tokens=0))
    for i in range(7):
        worker.add(str(i), 4)
    worker.admit()
    turns = Counter(key for _ in range(14) for key, _, _ in worker.step())
    assert set(turns.values()) == {6}


def test_a_step_is_never_empty_while_one_is_running() -> None:
    worker = Worker(4, _budget(max_batch=1, growth_horizon_tokens=0))
    for name in ("a", "b"):
        worker.add(name, 8)
    assert worker.reserve() == ["a", "b"]
    worker.scheduler.committed("b", 7, 0.0)  # its turn comes first, but it is the younger
    worker.scheduler.committed("a", 7, 0.0)
    assert worker.step() == [("a", 8, 1)]


def test_detached_blocks_stay_out_of_use_until_released() -> None:
    worker = Worker(4, _budget(growth_horizon_tokens=0))
    worker.add("a", 12)
    worker.add("b", 8)
    assert worker.reserve() == ["a"]
    blocks = worker.scheduler.detach("a")
    assert len(blocks) == 3
    worker.scheduler.check_integrity([blocks])
    assert worker.reserve() == [], "a transfer may still write there"
    worker.pool.release(blocks)
    assert worker.reserve() == ["b"]


def test_admission_does_not_count_detached_blocks_as_free() -> None:
    worker = Worker(8, _budget(growth_horizon_tokens=8))
    worker.add("a", 16)
    worker.reserve()
    blocks = worker.scheduler.detach("a")
    worker.add("b", 12)  # its 3 blocks are free now, but not the 5 that it claims
    assert worker.reserve() == []
    worker.pool.release(blocks)
    assert worker.reserve() == ["b"]


def test_cancel_frees_at_once_in_every_state() -> None:
    worker = Worker(4, _budget(growth_horizon_tokens=0))
    for name in ("old", "young"):
        worker.add(name, 8)
    worker.admit()
    worker.step()
    chunks = worker.scheduler.next_batch(0.0)
    waiting = worker.add("waiting", 1)
    for name, state in (("young", SequenceState.PREEMPTED), ("old", SequenceState.RUNNING)):
        sequence = worker.scheduler.get(name)
        assert sequence is not None
        assert sequence.state is state
        assert worker.scheduler.cancel(name) is sequence
        assert sequence.state is SequenceState.FINISHED
    assert not worker.scheduler.computed(chunks[0]), "the result of a cancelled chunk is dropped"
    assert worker.pool.num_free == 4
    assert worker.scheduler.cancel("waiting") is waiting
    assert worker.scheduler.cancel("waiting") is None


def test_expired_sequences_are_reported_once_and_left_to_the_worker() -> None:
    worker = Worker(8, _budget())
    late = worker.add("late", 4, deadline_s=3.0)
    worker.add("patient", 4)
    worker.reserve()
    assert worker.scheduler.expired(2.9) == []
    assert worker.scheduler.expired(3.0) == [late]
    assert worker.scheduler.expired(3.0) == []
    assert late.state is SequenceState.RECEIVING
    assert worker.scheduler.detach("late")
    assert len(worker.scheduler) == 1
