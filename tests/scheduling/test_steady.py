"""Many decode steps at once are the same as one after the other."""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from tandem.core.request import GenerationRequest, SamplingParams
from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.decode import DecodePolicy
from tandem.scheduling.sequence import Sequence
from tandem.scheduling.steady import GrowingBlocks
from tandem.scheduling.steady_decode import SteadyDecodeScheduler


@dataclass
class Worker:
    """A decode worker without an engine, in which every drawn token is 0. `finished` are (step, key)."""

    num_blocks: int
    block_size: int
    policy: DecodePolicy
    step: int = 0
    finished: list[tuple[int, object]] = field(default_factory=list)
    started: dict[object, float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.num_blocks)
        self.scheduler = SteadyDecodeScheduler(self.policy, self.pool, self.block_size, max_model_len=60)

    def add(self, key: int, num_tokens: int, max_tokens: int) -> None:
        request = GenerationRequest(str(key), (1,) * num_tokens, SamplingParams(max_tokens=max_tokens))
        if num_tokens < self.scheduler.max_model_len:
            self.scheduler.add(Sequence(key, request, 0.0))

    def admit(self) -> None:
        for sequence in self.scheduler.reserve(self.step):
            self.scheduler.committed(sequence.key, 0, self.step)

    def step_by_step(self, until_step: int) -> None:
        while self.step < until_step:
            self.admit()
            self._one_step()

    def fast(self, until_step: int) -> None:
        while self.step < until_step:
            self.admit()
            steady = self.scheduler.steady()
            if steady is None:
                self._one_step()
                continue
            num_steps = min(steady.max_steps, until_step - self.step)
            ended = self.scheduler.advance(num_steps, self.step)
            self.step += num_steps
            for sequence in ended:
                self._finish(sequence)

    def _one_step(self) -> None:
        chunks = self.scheduler.next_batch(self.step)
        self.step += 1
        for chunk in chunks:
            assert self.scheduler.computed(chunk)
            if chunk.samples:
                sequence = self.scheduler.generated(chunk.sequence.key, 0)
                if sequence.num_tokens >= self.scheduler.length_limit(sequence):
                    self._finish(sequence)

    def _finish(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence.key)
        self.finished.append((self.step, sequence.key))
        self.started[sequence.key] = sequence.started_s

    def state(self) -> tuple[object, ...]:
        """Everything that may be told of it, but which block is whose."""
        tables = [len(table) for table in self.scheduler.block_tables()]
        self.scheduler.check_integrity()
        return self.scheduler.counts(), tables, self.pool.num_free, self.finished, self.started


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
    policy = DecodePolicy(max_batch, 1000, horizon, max_chunk_tokens=7)
    plain, fast = Worker(num_blocks, block_size, policy), Worker(num_blocks, block_size, policy)
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


def test_no_step_is_looked_at_alone_while_a_batch_is_steady() -> None:
    worker = Worker(60, 4, DecodePolicy(8, 8, growth_horizon_tokens=4))
    worker.add(0, 9, 20)
    worker.add(1, 3, 30)
    worker.admit()
    steady = worker.scheduler.steady()
    assert steady is not None
    assert (steady.max_steps, steady.num_sequences, steady.kv_tokens) == (19, 2, 14)
    assert [sequence.key for sequence in worker.scheduler.advance(19, 0.0)] == [0]


@given(st.integers(1, 7), st.lists(st.integers(-20, 40)), st.integers(0, 50))
def test_growing_blocks_add_up(block_size: int, starts: list[int], step: int) -> None:
    blocks = GrowingBlocks(block_size)
    for start in starts:
        blocks.add(start)
    assert blocks.at(step) == sum(-(-(start + step) // block_size) for start in starts)
    for start in starts:
        blocks.add(start, -1)
    assert blocks.at(step) == 0
