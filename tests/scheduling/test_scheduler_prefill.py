import pytest

from tandem.core.errors import ContextLengthError, OverloadedError
from tandem.core.request import GenerationRequest, SamplingParams
from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.budget import StepBudget
from tandem.scheduling.leases import LeaseTable
from tandem.scheduling.prefix_index import PrefixIndex
from tandem.scheduling.scheduler import Scheduler
from tandem.scheduling.sequence import Sequence, SequenceState


class Worker:
    """An instance without an engine that prefills for others. `step` computes one batch and releases what is
    finished."""

    def __init__(self, num_blocks: int = 100, max_batch_tokens: int = 10, max_queue: int = 10) -> None:
        self.pool = BlockPool(num_blocks)
        self.leases = LeaseTable()
        self.index = PrefixIndex(self.pool, block_size=4)
        budget = StepBudget(max_batch_tokens, max_batch_tokens, max_batch_tokens, max_queue)
        self.scheduler = Scheduler(budget, self.pool, self.index, max_model_len=200)
        self.finished: list[Sequence] = []

    def add(
        self, name: str, token_ids: range, *, deadline_s: float = float("inf"), prompt_logprobs: int | None = None
    ) -> Sequence:
        sampling = SamplingParams(prompt_logprobs=prompt_logprobs)
        request = GenerationRequest(name, tuple(token_ids), sampling, deadline_s=deadline_s)
        sequence = Sequence(name, request, arrival_s=0.0, hand_over=True)
        self.scheduler.add(sequence)
        return sequence

    def step(self, now_s: float = 0.0) -> list[tuple[object, int, int]]:
        chunks = self.scheduler.next_batch(now_s)
        for chunk in chunks:
            assert self.scheduler.computed(chunk)
            if chunk.samples:
                self.finished.append(chunk.sequence)
                self.scheduler.release(chunk.sequence)
        self.scheduler.check_integrity(self.leases.block_tables())
        return [(chunk.sequence.key, chunk.start, chunk.num_tokens) for chunk in chunks]


def test_packs_short_prompts_and_chunks_long_ones_in_order() -> None:
    worker = Worker(max_batch_tokens=10)
    for name, prompt in (("a", range(3)), ("b", range(100, 118)), ("c", range(50, 54))):
        worker.add(name, prompt)
    assert worker.scheduler.counts().uncomputed_tokens == 25
    assert worker.step() == [("a", 0, 3), ("b", 0, 7)]
    assert worker.step() == [("b", 7, 10)]
    assert worker.step() == [("b", 17, 1), ("c", 0, 4)]
    assert worker.step() == []
    assert worker.scheduler.counts().uncomputed_tokens == 0


def test_a_cached_prefix_is_not_computed_again() -> None:
    worker = Worker()
    worker.add("a", range(9))
    worker.step()
    again = worker.add("b", range(9))
    assert worker.step() == [("b", 8, 1)]
    assert again.num_cached == 8
    assert worker.scheduler.counts().cached_tokens == 8


def test_prompt_logprobs_need_the_whole_prompt_computed() -> None:
    worker = Worker()
    worker.add("a", range(9))
    worker.step()
    worker.add("b", range(9), prompt_logprobs=1)
    assert worker.step() == [("b", 0, 9)]


def test_prompts_that_never_fit_and_a_full_queue_are_refused() -> None:
    worker = Worker(num_blocks=5, max_queue=2)
    assert worker.scheduler.max_model_len == 20
    with pytest.raises(ContextLengthError, match="has 20 tokens"):
        worker.add("long", range(20))
    worker.add("a", range(19))
    worker.add("b", range(1))
    with pytest.raises(OverloadedError):
        worker.add("c", range(1))
    assert len(worker.scheduler) == 2


def test_leased_memory_delays_the_first_prompt_and_no_other_overtakes_it() -> None:
    worker = Worker(num_blocks=4)
    worker.leases.hold("held", 0, worker.pool.allocate(2), expires_s=5.0)
    worker.add("big", range(10))
    worker.add("small", range(50, 52))
    assert worker.step() == []
    for lease in worker.leases.expire(5.0):
        worker.pool.release(lease.block_ids)
    assert worker.step() == [("big", 0, 10)]


def test_cached_blocks_are_evicted_for_new_sequences() -> None:
    worker = Worker(num_blocks=4)
    worker.add("a", range(8))
    worker.step()
    assert worker.pool.num_reclaimable == 2
    worker.add("b", range(50, 64))
    assert worker.step() == [("b", 0, 10)]
    assert worker.index.match(list(range(9)), "") == []


def test_cancel_frees_in_every_state() -> None:
    worker = Worker(max_batch_tokens=10)
    running, waiting = worker.add("running", range(15)), worker.add("waiting", range(50, 55))
    chunks = worker.scheduler.next_batch(0.0)
    assert (running.state, waiting.state) == (SequenceState.RUNNING, SequenceState.WAITING)
    assert worker.scheduler.cancel("running") is running
    assert worker.scheduler.cancel("waiting") is waiting
    assert worker.scheduler.cancel("waiting") is None
    assert not worker.scheduler.computed(chunks[0]), "the result of a cancelled chunk is dropped"
    assert worker.pool.num_free == 100
    assert worker.step() == []


def test_deadlines_end_waiting_and_running_sequences_once() -> None:
    worker = Worker(max_batch_tokens=10)
    running = worker.add("running", range(15), deadline_s=3.0)
    worker.add("waiting", range(50, 55), deadline_s=3.0)
    patient = worker.add("patient", range(60, 65))
    worker.step()
    assert worker.scheduler.expired(2.9) == []
    expired = worker.scheduler.expired(3.0)
    assert {sequence.key for sequence in expired} == {"running", "waiting"}
    for sequence in expired:
        worker.scheduler.cancel(sequence.key)
    assert worker.step(3.0) == [("patient", 0, 5)]
    assert running.block_table == []
    assert worker.scheduler.expired(9.0) == []
    assert worker.finished == [patient]
