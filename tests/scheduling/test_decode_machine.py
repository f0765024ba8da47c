"""The decode scheduler in any order of events: arrival, commit, steps, cancel, broken transfers, deadlines."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tandem.core.errors import ContextLengthError, OverloadedError
from tandem.core.request import GenerationRequest, SamplingParams
from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.decode import DecodePolicy, DecodeScheduler
from tandem.scheduling.sequence import Sequence, SequenceState
from tests.scheduling.fake_kv import FakeKv

_MAX_QUEUE = 6


def _next_token(token_ids: list[int]) -> int:
    """A model's stand-in: any function of the whole prefix."""
    return hash(tuple(token_ids)) % 17


class DecodeMachine(RuleBasedStateMachine):
    """`self.open` are the sequences not yet ended one way or another."""

    @initialize(
        num_blocks=st.integers(2, 14),
        block_size=st.sampled_from([1, 2, 4]),
        max_batch=st.integers(1, 5),
        horizon=st.integers(0, 12),
        max_chunk=st.integers(1, 12),
    )
    def start(self, num_blocks: int, block_size: int, max_batch: int, horizon: int, max_chunk: int) -> None:
        self.now_s = 0.0
        self.policy = DecodePolicy(max_batch, _MAX_QUEUE, horizon, max_chunk)
        self.pool = BlockPool(num_blocks)
        self.scheduler = DecodeScheduler(self.policy, self.pool, block_size, max_model_len=40)
        self.kv = FakeKv(num_blocks, block_size)
        self.open: dict[int, Sequence] = {}
        self.quarantine: list[list[int]] = []
        self.num_added = 0

    def _in(self, state: SequenceState) -> list[int]:
        return sorted(number for number, sequence in self.open.items() if sequence.state is state)

    @rule(
        prompt_tokens=st.integers(1, 24),
        max_tokens=st.integers(2, 20),
        num_output_tokens=st.integers(0, 2),
        patience_s=st.sampled_from([2.0, float("inf"), float("inf")]),
    )
    def add(self, prompt_tokens: int, max_tokens: int, num_output_tokens: int, patience_s: float) -> None:
        self._add(prompt_tokens, max_tokens, num_output_tokens, patience_s)

    @rule(prompt_tokens=st.integers(1, 4), count=st.integers(2, 5))
    def add_short_ones_that_grow(self, prompt_tokens: int, count: int) -> None:
        for _ in range(count):
            self._add(prompt_tokens, 20, 0, float("inf"))

    def _add(self, prompt_tokens: int, max_tokens: int, num_output_tokens: int, patience_s: float) -> None:
        request = GenerationRequest(
            request_id=str(self.num_added),
            token_ids=tuple((self.num_added + i) % 7 for i in range(prompt_tokens)),
            sampling=SamplingParams(max_tokens=max_tokens),
            num_output_tokens=min(num_output_tokens, prompt_tokens - 1, max_tokens - 2),
            deadline_s=self.now_s + patience_s,
        )
        sequence = Sequence(self.num_added, request, self.now_s)
        self.num_added += 1
        waiting = len(self._in(SequenceState.WAITING))
        try:
            self.scheduler.add(sequence)
        except ContextLengthError:
            assert prompt_tokens >= self.scheduler.max_model_len
        except OverloadedError:
            assert waiting == _MAX_QUEUE
        else:
            assert waiting < _MAX_QUEUE
            self.open[self.num_added - 1] = sequence

    @rule()
    def reserve(self) -> None:
        line, preempted = self._in(SequenceState.WAITING), self._in(SequenceState.PREEMPTED)
        reserved = self.scheduler.reserve(self.now_s)
        assert [sequence.key for sequence in reserved] == line[: len(reserved)], "not in order of arrival"
        assert not (preempted and reserved), "a newcomer passed a preempted one"
        if line and not self.quarantine and len(line) == len(self.open):
            assert reserved, "the first in line must get an empty worker"

    @precondition(lambda self: self._in(SequenceState.RESERVED))
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        self._commit(data.draw(st.sampled_from(self._in(SequenceState.RESERVED))))

    def _commit(self, number: int) -> None:
        sequence = self.open[number]
        self.kv.write(sequence.block_table, sequence.token_ids, 0, sequence.num_tokens)
        self.scheduler.committed(number, _next_token(sequence.token_ids), self.now_s)
        self._finish_if_done(sequence)

    @rule()
    def step(self) -> None:
        ready = self._in(SequenceState.RUNNING)
        chunks = self.scheduler.next_batch(self.now_s)
        assert len(chunks) <= self.policy.max_batch
        assert len({chunk.sequence.key for chunk in chunks}) == len(chunks)
        assert sum(c.num_tokens for c in chunks if c.num_tokens > 1) <= self.policy.max_chunk_tokens
        if ready and not self.quarantine and not self._in(SequenceState.RESERVED):
            assert chunks, "somebody must advance"
        for chunk in chunks:
            sequence, end = chunk.sequence, chunk.start + chunk.num_tokens
            assert sequence.state is SequenceState.RUNNING
            assert chunk.samples == (end == sequence.num_tokens)
            self.kv.check(sequence.block_table, sequence.token_ids, chunk.start)
            self.kv.write(sequence.block_table, sequence.token_ids, chunk.start, end)
        for chunk in chunks:
            assert self.scheduler.computed(chunk)
            if chunk.samples:
                sequence = chunk.sequence
                assert self.scheduler.generated(sequence.key, _next_token(sequence.token_ids)) is sequence
                self._finish_if_done(sequence)

    def _finish_if_done(self, sequence: Sequence) -> None:
        if sequence.finish_reason_after(sequence.token_ids[-1], frozenset({0}), self.scheduler.max_model_len):
            del self.open[int(sequence.request.request_id)]
            self.scheduler.finish(sequence.key)
            for end in range(len(sequence.request.token_ids), sequence.num_tokens):
                assert sequence.token_ids[end] == _next_token(sequence.token_ids[:end])

    @rule(count=st.integers(1, 12))
    def several_rounds(self, count: int) -> None:
        for _ in range(count):
            self.reserve()
            for number in self._in(SequenceState.RESERVED):
                self._commit(number)
            self.step()

    @rule(seconds=st.sampled_from([0.5, 2.0]))
    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def expire(self) -> None:
        for sequence in self.scheduler.expired(self.now_s):
            assert sequence.request.deadline_s <= self.now_s
            self._drop(int(sequence.request.request_id))
        assert self.scheduler.expired(self.now_s) == []
        assert all(sequence.request.deadline_s > self.now_s for sequence in self.open.values())

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self._drop(data.draw(st.sampled_from(sorted(self.open))))

    def _drop(self, number: int) -> None:
        sequence = self.open.pop(number)
        if sequence.state is SequenceState.RESERVED:
            blocks = list(sequence.block_table)
            assert self.scheduler.detach(number) == blocks
            self.quarantine.append(blocks)
        else:
            assert self.scheduler.cancel(number) is sequence
        assert sequence.state is SequenceState.FINISHED
        assert sequence.block_table == []
        assert self.scheduler.cancel(number) is None

    @precondition(lambda self: self.quarantine)
    @rule()
    def transfer_ends(self) -> None:
        self.pool.release(self.quarantine.pop(0))

    @invariant()
    def blocks_are_conserved(self) -> None:
        if hasattr(self, "pool"):
            self.scheduler.check_integrity(self.quarantine)
            counts = self.scheduler.counts()
            assert counts.waiting == len(self._in(SequenceState.WAITING))
            assert counts.reserved == len(self._in(SequenceState.RESERVED))
            assert counts.running == len(self._in(SequenceState.RUNNING))
            assert counts.preempted == len(self._in(SequenceState.PREEMPTED))

    def teardown(self) -> None:
        """Whatever happened, all that is left gets its turn within a bounded number of steps; then nothing is held."""
        if not hasattr(self, "pool"):
            return
        while self.quarantine:
            self.transfer_ends()
        # Alone, a sequence needs a step per chunk and per token; preemption repeats that at most once per older one.
        alone = sum(2 * sequence.num_tokens + 20 for sequence in self.open.values())
        for _ in range(alone * (len(self.open) + 1)):
            if self.open:
                self.several_rounds(1)
        assert not self.open
        self.blocks_are_conserved()
        assert self.pool.num_free == self.pool.num_blocks


TestDecodeMachine = DecodeMachine.TestCase
TestDecodeMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
