"""Many decode steps at once are the same as one after the other."""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from tandem.core.request import GenerationRequest, SamplingParams
from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.budget import StepBudget
from tandem.scheduling.fast_forward import BlockGrowth
from tandem.scheduling.fast_forward_scheduler import FastForwardScheduler
from tandem.scheduling.prefix_index import PrefixIndex
from tandem.scheduling.sequence import Sequence


@dataclass
class Worker:
    """An instance without an engine that decodes what others have prefilled, in which every drawn token is 0.
    `finished` are (step, key)."""

    num_blocks: int
    block_size: int
    budget: StepBudget
    step: int = 0
    finished: list[tuple[int, object]] = field(default_factory=list)
    decoded_s: dict[object, int] = field(default_factory=dict)  # when the first step of decoding began

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.num_blocks)
        self.scheduler = FastForwardScheduler(
            self.budget, self.pool, PrefixIndex(self.pool, self.block_size, enabled=False), max_model_len=60
        )

    def add(self, key: int, num_tokens: int, max_tokens: int) -> None:
        request = GenerationRequest(str(key), (1,) * num_tokens, SamplingParams(max_tokens=max_tokens))
        if num_tokens < self.scheduler.max_model_len:
            self.scheduler.add(Sequence(key, request, 0.0, is_remote=True))

    def admit(self) -> None:
        for sequence in self.scheduler.reserve():
            self.scheduler.committed(sequence.key, 0, self.step)

    def step_by_step(self, until_step: int) -> None:
        while self.step < until_step:
            self.admit()
            self._one_step()

    def fast(self, until_step: int) -> None:
        while self.step < until_step:
            self.admit()
            steps = self.scheduler.fast_forward()
            if steps is None:
                self._one_step()
                continue
            num_steps = min(steps.max_steps, until_step - self.step)
            for sequence in steps.newcomers:
                self.decoded_s[sequence.key] = self.step
            ended = self.scheduler.advance(num_steps)
            self.step += num_steps
            for sequence in ended:
                self._finish(sequence)

    def _one_step(self) -> None:
        chunks = self.scheduler.next_batch(self.step)
        self.step += 1
        for chunk in chunks:
            assert self.scheduler.computed(chunk)
            if chunk.samples:
                if chunk.sequence.num_tokens == len(chunk.sequence.request.token_ids) + 1:
                    self.decoded_s[chunk.sequence.key] = self.step - 1
                sequence = self.scheduler.generated(chunk.sequence.key, 0)
                if sequence.num_tokens >= self.scheduler.length_limit(sequence):
                    self._finish(sequence)

    def _finish(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence.key)
        self.finished.append((self.step, sequence.key))

    def state(self) -> tuple[object, ...]:
        """Everything that may be told of it, but which block is whose."""
        tables = [len(table) for table in self.scheduler.block_tables()]
        self.scheduler.check_integrity()
        return self.scheduler.counts(), tables, self.pool.num_free, self.finished, self.decoded_s


_ADDED = st.lists(st.tuples(st.integers(1, 30), st.integers(2, 40)), max_size=4)


@given(
    num_blocks=st.integers(4, 60),
    block_size=st.sampled_from([1, 2, 5]),
    max_batch=st.integers(1, 6),
    horizon=st.integers(0, 30),
    rounds=st.lists(st.tuples(_ADDED, st.integers(0, 25), st.integers(0, 40)), min_size=1, max_size=6),
    looks=st.booleans(),
)
def test_advance_equals_single_steps(
    num_blocks: int,
    block_size: int,
    max_batch: int,
    horizon: int,
    rounds: list[tuple[list[tuple[int, int]], int, int]],
    looks: bool,
) -> None:
    budget = StepBudget(max_batch, max_batch + 7, 7, 1000, growth_horizon_tokens=horizon)
    plain, fast = Worker(num_blocks, block_size, budget), Worker(num_blocks, block_size, budget)
    key = until_step = 0
    for added, cancelled, num_steps in rounds:
        for num_tokens, max_tokens in added:
            for worker in (plain, fast):
                worker.add(key, num_tokens, max_tokens)
            key += 1
        until_step += num_steps
        plain.step_by_step(until_step)
        fast.fast(until_step)
        assert plain.scheduler.counts() == fast.scheduler.counts()
        assert plain.finished == fast.finished
        for worker in (plain, fast):
            worker.scheduler.cancel(cancelled)
        if looks:  # which brings the fast one's sequences up to date
            assert plain.state() == fast.state()
            for number in range(key):
                one, other = plain.scheduler.get(number), fast.scheduler.get(number)
                assert (one is None) == (other is None)
                assert one is None or other is None or one.token_ids == other.token_ids
    assert plain.state() == fast.state()


def test_equal_steps_are_not_computed_one_by_one() -> None:
    worker = Worker(60, 4, StepBudget(8, 15, 7, 8, growth_horizon_tokens=4))
    worker.add(0, 9, 20)
    worker.add(1, 3, 30)
    worker.admit()
    steps = worker.scheduler.fast_forward()
    assert steps is not None
    assert (steps.max_steps, steps.num_sequences, steps.kv_tokens) == (19, 2, 14)
    assert [sequence.key for sequence in worker.scheduler.advance(19)] == [0]


@given(st.integers(1, 7), st.lists(st.integers(-20, 40)), st.integers(0, 50))
def test_block_growth_adds_up(block_size: int, starts: list[int], step: int) -> None:
    blocks = BlockGrowth(block_size)
    for start in starts:
        blocks.add(start)
    assert blocks.at(step) == sum(-(-(start + step) // block_size) for start in starts)
    for start in starts:
        blocks.add(start, -1)
    assert blocks.at(step) == 0
