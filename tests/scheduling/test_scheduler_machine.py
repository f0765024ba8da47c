"""Scheduler, pool, prefix cache and leases together, in any order of events: prompts that are computed for others, KV
that arrives, requests that stay for both phases, steps, of which several may be under way, cancels, broken transfers,
deadlines, and changes of the budget."""

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tandem.core.errors import ContextLengthError, OverloadedError
from tandem.core.request import GenerationRequest, SamplingParams
from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.budget import Mixing, StepBudget
from tandem.scheduling.chunk import Chunk
from tandem.scheduling.integrity import count_blocks
from tandem.scheduling.leases import LeaseTable
from tandem.scheduling.prefix_index import PrefixIndex
from tandem.scheduling.scheduler import Scheduler
from tandem.scheduling.sequence import Sequence, SequenceState
from tests.scheduling.fake_kv import FakeKv

_MAX_QUEUE = 6
_KINDS = ("hand_over", "remote", "both")


def _next_token(token_ids: list[int]) -> int:
    """A model's stand-in: any function of the whole prefix."""
    return hash(tuple(token_ids)) % 17


@st.composite
def _budgets(draw: st.DrawFn) -> StepBudget:
    mixing: Mixing = draw(st.sampled_from(["chunked", "prompt_first"]))
    max_batch_tokens = draw(st.integers(1, 20))
    return StepBudget(
        max_batch=draw(st.integers(1, 5)),
        max_batch_tokens=max_batch_tokens,
        max_prefill_tokens=draw(st.integers(1, max_batch_tokens)),
        max_queue=_MAX_QUEUE,
        mixing=mixing,
        growth_horizon_tokens=draw(st.sampled_from([0, 0, 3, 12])),
        watermark=draw(st.sampled_from([0.0, 0.0, 0.2])),
    )


class SchedulerMachine(RuleBasedStateMachine):
    """`self.open` are the sequences that have not ended one way or another, `self.held` those under lease."""

    @initialize(
        num_blocks=st.integers(4, 14),
        block_size=st.sampled_from([1, 2, 4]),
        budget=_budgets(),
        caching=st.booleans(),
        kinds=st.sampled_from([("hand_over",), ("remote",), ("both",), _KINDS, _KINDS]),
        num_stages=st.sampled_from([1, 1, 2, 3]),
    )
    def start(
        self,
        num_blocks: int,
        block_size: int,
        budget: StepBudget,
        caching: bool,
        kinds: tuple[str, ...],
        num_stages: int,
    ) -> None:
        self.now_s = 0.0
        self.kinds = kinds
        self.num_stages = num_stages
        self.under_way: deque[list[tuple[Chunk, list[int], list[int]]]] = deque()  # with block tables and tokens
        self.pool = BlockPool(num_blocks)
        self.index = PrefixIndex(self.pool, block_size, caching)
        self.scheduler = Scheduler(budget, self.pool, self.index, max_model_len=40, num_stages=num_stages, min_group=1)
        self.leases = LeaseTable()
        self.kv = FakeKv(num_blocks, block_size)
        self.open: dict[int, Sequence] = {}
        self.held: dict[int, Sequence] = {}
        self.quarantine: list[list[int]] = []
        self.computed_prompts: list[tuple[list[int], str]] = []
        self.num_added = 0

    def _in(self, state: SequenceState) -> list[int]:
        return sorted(number for number, sequence in self.open.items() if sequence.state is state)

    # --- coming in ---------------------------------------------------------------------------------------------------

    @rule(
        zeros=st.integers(0, 12),
        ones=st.integers(1, 12),
        kind=st.integers(0, 2),
        salt=st.sampled_from(["", "tenant"]),
        max_tokens=st.integers(2, 20),
        num_output_tokens=st.integers(0, 2),
        patience_s=st.sampled_from([2.0, float("inf"), float("inf")]),
        prompt_logprobs=st.sampled_from([None, None, None, 1]),
    )
    def add(
        self,
        zeros: int,
        ones: int,
        kind: int,
        salt: str,
        max_tokens: int,
        num_output_tokens: int,
        patience_s: float,
        prompt_logprobs: int | None,
    ) -> None:
        sampling = SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
        self._add([0] * zeros + [1] * ones, kind, salt, sampling, num_output_tokens, patience_s)

    @precondition(lambda self: self.computed_prompts)
    @rule(data=st.data(), more=st.integers(0, 6), kind=st.integers(0, 2), salt=st.sampled_from([None, None, "tenant"]))
    def add_next_turn(self, data: st.DataObject, more: int, kind: int, salt: str | None) -> None:
        token_ids, known_salt = data.draw(st.sampled_from(self.computed_prompts[-4:]))
        self._add([*token_ids, *range(more)], kind, known_salt if salt is None else salt, SamplingParams())

    @rule(prompt_tokens=st.integers(1, 4), count=st.integers(2, 5), kind=st.integers(0, 2))
    def add_short_ones_that_grow(self, prompt_tokens: int, count: int, kind: int) -> None:
        for number in range(count):
            self._add([number] * prompt_tokens, kind, "", SamplingParams(max_tokens=20))

    def _add(
        self,
        token_ids: list[int],
        kind: int,
        salt: str,
        sampling: SamplingParams,
        num_output_tokens: int = 0,
        patience_s: float = float("inf"),
    ) -> None:
        request = GenerationRequest(
            request_id=str(self.num_added),
            token_ids=tuple(token_ids),
            sampling=sampling,
            num_output_tokens=min(num_output_tokens, len(token_ids) - 1, sampling.max_tokens - 2),
            cache_salt=salt,
            deadline_s=self.now_s + patience_s,
        )
        name = self.kinds[kind % len(self.kinds)]
        sequence = Sequence(
            self.num_added, request, self.now_s, is_remote=name == "remote", hand_over=name == "hand_over"
        )
        self.num_added += 1
        waiting = len(self._in(SequenceState.WAITING))
        try:
            self.scheduler.add(sequence)
        except ContextLengthError:
            assert len(token_ids) >= self.scheduler.max_model_len
        except OverloadedError:
            assert waiting == _MAX_QUEUE
        else:
            assert waiting < _MAX_QUEUE
            self.open[self.num_added - 1] = sequence

    # --- stepping ----------------------------------------------------------------------------------------------------

    @rule()
    def reserve(self) -> None:
        line = [number for number in self._in(SequenceState.WAITING) if self.open[number].is_remote]
        preempted = self._in(SequenceState.PREEMPTED)
        reserved = self.scheduler.reserve()
        assert [sequence.key for sequence in reserved] == line[: len(reserved)], "not in order of arrival"
        assert not (preempted and reserved), "a newcomer passed a preempted one"
        is_empty = not (self.quarantine or self.held or self.under_way)  # a step keeps blocks of those that are gone
        if line and is_empty and len(line) == len(self.open):
            assert reserved, "the first in line must get an empty instance"

    @precondition(lambda self: self._in(SequenceState.RECEIVING))
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        self._commit(data.draw(st.sampled_from(self._in(SequenceState.RECEIVING))))

    def _commit(self, number: int) -> None:
        sequence = self.open[number]
        self.kv.write(sequence.block_table, sequence.token_ids, 0, sequence.num_tokens, sequence.request.cache_salt)
        self.scheduler.committed(number, _next_token(sequence.token_ids), self.now_s)
        self._finish_if_done(sequence)

    @rule()
    def step(self) -> None:
        if len(self.under_way) == self.num_stages:
            self.collect()
        budget, before = self.scheduler.budget, self.scheduler.counts()
        chunks = self.scheduler.next_batch(self.now_s)
        self._check_batch_order()
        prompts = [chunk for chunk in chunks if chunk.is_prompt]
        decoding = [chunk for chunk in chunks if not chunk.is_prompt]
        assert len({chunk.sequence.key for chunk in chunks}) == len(chunks)
        assert len(decoding) <= self._share(budget.max_batch)
        preempted = self.scheduler.counts().preemptions - before.preemptions
        if budget.mixing == "chunked":
            assert sum(chunk.num_tokens for chunk in prompts) <= self._share(budget.max_prefill_tokens)
            if prompts:
                assert sum(chunk.num_tokens for chunk in chunks) <= self._share(budget.max_batch_tokens)
            if not self.under_way:
                due = self._share(min(before.decoding, budget.max_batch))
                assert len(decoding) >= due - preempted, "a prompt stalled decoding"
        else:
            assert prompts in ([], chunks), "a step of prompts and decoding"
            num_tokens = sum(chunk.num_tokens for chunk in prompts)
            assert num_tokens <= self._share(budget.max_prefill_tokens) or len(prompts) == 1 or preempted
        is_alone = not self.quarantine and not self.held and not self.under_way
        if before.prompts + before.decoding and is_alone and not before.receiving:
            assert chunks, "a running sequence must advance"
        drawing = {id(chunk.sequence) for step in self.under_way for chunk, _, _ in step if chunk.samples}
        for chunk in chunks:
            sequence, salt = chunk.sequence, chunk.sequence.request.cache_salt
            end = chunk.start + chunk.num_tokens
            assert id(sequence) not in drawing, "its next token is not known yet"
            assert sequence.state is SequenceState.RUNNING
            assert chunk.samples == (end == sequence.num_tokens)
            assert sequence.num_cached == 0 or sequence.request.sampling.prompt_logprobs is None
            self.kv.check(sequence.block_table, sequence.token_ids, chunk.start, salt)
            self.kv.write(sequence.block_table, sequence.token_ids, chunk.start, end, salt)
        if chunks:
            if self.num_stages > 1:
                self.scheduler.launched(chunks)
            blocks = [(chunk, list(chunk.sequence.block_table), list(chunk.sequence.token_ids)) for chunk in chunks]
            self.under_way.append(blocks)
        if not chunks or self.num_stages == 1:
            self.collect()

    @rule()
    def collect(self) -> None:
        """The oldest step is computed: its KV is where it was written, also that of sequences that are gone."""
        for chunk, block_table, token_ids in self.under_way.popleft() if self.under_way else ():
            sequence, end = chunk.sequence, chunk.start + chunk.num_tokens
            self.kv.check(block_table, token_ids, end, sequence.request.cache_salt)
            is_open = self.open.get(int(sequence.request.request_id)) is sequence
            assert self.scheduler.computed(chunk) == is_open
            if not is_open:
                continue
            if chunk.samples and sequence.hand_over:
                self._hand_over(sequence)
            elif chunk.samples:
                assert self.scheduler.generated(sequence.key, _next_token(sequence.token_ids)) is sequence
                self._finish_if_done(sequence)

    def _share(self, amount: int) -> int:
        return -(-amount // self.num_stages)

    def _check_batch_order(self) -> None:
        """Of prompts that were never preempted, nobody was started before an older one."""
        waiting = [n for n in self._in(SequenceState.WAITING) if not self.open[n].is_remote]
        running = [n for n in self._in(SequenceState.RUNNING) if not self.open[n].is_remote]
        assert all(old < new for old in running for new in waiting), "a later one was started first"

    def _finish_if_done(self, sequence: Sequence) -> None:
        if sequence.finish_reason_after(sequence.token_ids[-1], frozenset({0}), self.scheduler.max_model_len):
            del self.open[int(sequence.request.request_id)]
            self.scheduler.finish(sequence.key)
            self.computed_prompts.append((sequence.token_ids, sequence.request.cache_salt))
            for end in range(len(sequence.request.token_ids), sequence.num_tokens):
                assert sequence.token_ids[end] == _next_token(sequence.token_ids[:end])

    def _hand_over(self, sequence: Sequence) -> None:
        number = int(sequence.request.request_id)
        assert self.open.pop(number) is sequence
        assert sequence.state is SequenceState.HELD
        self.computed_prompts.append((sequence.token_ids, sequence.request.cache_salt))
        if number % 5 == 0:
            self.scheduler.release(sequence)
        else:
            self.held[number] = sequence
            expires_s = self.now_s + 1 + number % 4
            self.leases.hold(sequence.request.request_id, 0, sequence.block_table, expires_s)

    @rule(count=st.integers(1, 12))
    def several_rounds(self, count: int) -> None:
        for _ in range(count):
            self.reserve()
            for number in self._in(SequenceState.RECEIVING):
                self._commit(number)
            self.step()

    @rule(budget=_budgets())
    def change_budget(self, budget: StepBudget) -> None:
        self.scheduler.set_budget(budget)

    # --- going out ---------------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0]))
    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def expire(self) -> None:
        for sequence in self.scheduler.expired(self.now_s):
            assert sequence.request.deadline_s <= self.now_s
            self._drop(int(sequence.request.request_id))
        assert self.scheduler.expired(self.now_s) == []
        assert all(sequence.request.deadline_s > self.now_s for sequence in self.open.values())

    @rule()
    def expire_leases(self) -> None:
        for lease in self.leases.expire(self.now_s):
            assert lease.expires_s <= self.now_s
            self.scheduler.release(self.held.pop(int(lease.request_id)))
        assert all(self.leases.find(str(number), 0, self.now_s) is not None for number in self.held)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def fetch(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.held)))
        request = self.held[number].request
        lease = self.leases.find(request.request_id, 0, self.now_s)
        if lease is not None:
            self.kv.check(lease.block_ids, request.token_ids, len(request.token_ids), request.cache_salt)
        assert self.leases.acknowledge(request.request_id, 1, self.now_s) is None
        accepted = self.leases.acknowledge(request.request_id, 0, self.now_s)
        assert accepted is lease
        if accepted is not None:
            self.scheduler.release(self.held.pop(number))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self._drop(data.draw(st.sampled_from(sorted(self.open))))

    def _drop(self, number: int) -> None:
        sequence = self.open.pop(number)
        if sequence.state is SequenceState.RECEIVING:
            blocks = list(sequence.block_table)
            assert self.scheduler.detach(number) == blocks
            self.quarantine.append(blocks)
        else:
            assert self.scheduler.cancel(number) is sequence
        assert sequence.state is SequenceState.FINISHED
        assert sequence.block_table == [] or sequence.num_under_way
        assert self.scheduler.cancel(number) is None

    @precondition(lambda self: self.quarantine)
    @rule()
    def transfer_ends(self) -> None:
        self.pool.release(self.quarantine.pop(0))

    @rule(count=st.integers(0, 4))
    def evict(self, count: int) -> None:
        before = self.pool.num_reclaimable
        assert self.index.evict(count) == min(count, before)

    @rule()
    def clear_cache(self) -> None:
        self.index.clear()
        assert self.pool.num_reclaimable == 0

    # --- always ------------------------------------------------------------------------------------------------------

    @invariant()
    def blocks_are_conserved(self) -> None:
        if not hasattr(self, "pool"):
            return
        leased = self.leases.block_tables()
        self.scheduler.check_integrity([*self.quarantine, *leased])
        num_owned = self.scheduler.num_held_blocks + sum(map(len, (*self.quarantine, *leased)))
        blocks = count_blocks(self.pool, num_owned, len({block_id for table in leased for block_id in table}))
        assert blocks.leaked == 0
        assert blocks.free + blocks.running + blocks.cached + blocks.leased == blocks.total
        counts = self.scheduler.counts()
        assert counts.waiting + counts.unreserved == len(self._in(SequenceState.WAITING))
        assert counts.receiving == len(self._in(SequenceState.RECEIVING))
        assert counts.prompts + counts.decoding == len(self._in(SequenceState.RUNNING))
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
                self.now_s += 10.0
                self.expire_leases()
        assert not self.open
        while self.under_way:
            self.collect()
        self.now_s += 10.0
        self.expire_leases()
        assert not self.held
        self.blocks_are_conserved()
        counts = self.scheduler.counts()
        assert (counts.uncomputed_tokens, counts.unreserved_tokens) == (0, 0)
        assert self.pool.num_held == 0
        self.index.clear()
        assert self.pool.num_free == self.pool.num_blocks


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)
