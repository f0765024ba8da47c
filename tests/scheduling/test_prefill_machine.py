"""Pool, prefix cache, prefill scheduler and leases together, in any order of events."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tandem.core.errors import ContextLengthError, OverloadedError
from tandem.core.request import GenerationRequest, SamplingParams
from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.integrity import count_blocks
from tandem.scheduling.leases import LeaseTable
from tandem.scheduling.prefill import PrefillPolicy, PrefillScheduler
from tandem.scheduling.prefix_index import PrefixIndex
from tandem.scheduling.sequence import Sequence, SequenceState
from tests.scheduling.fake_kv import FakeKv

_MAX_QUEUE = 6


class PrefillMachine(RuleBasedStateMachine):
    """`self.open` are the sequences not yet ended one way or another; `self.held` those under lease."""

    @initialize(
        num_blocks=st.integers(4, 14),
        block_size=st.sampled_from([1, 2, 4]),
        max_batch_tokens=st.integers(1, 20),
        enabled=st.booleans(),
    )
    def start(self, num_blocks: int, block_size: int, max_batch_tokens: int, enabled: bool) -> None:
        self.now_s = 0.0
        self.max_batch_tokens = max_batch_tokens
        self.pool = BlockPool(num_blocks)
        self.index = PrefixIndex(self.pool, block_size, enabled)
        self.leases = LeaseTable()
        policy = PrefillPolicy(max_batch_tokens, _MAX_QUEUE)
        self.scheduler = PrefillScheduler(policy, self.pool, self.index, block_size, max_model_len=40)
        self.kv = FakeKv(num_blocks, block_size)
        self.open: dict[int, Sequence] = {}
        self.held: dict[int, Sequence] = {}
        self.computed_prompts: list[tuple[list[int], str]] = []
        self.num_added = 0

    @rule(
        zeros=st.integers(0, 16),
        ones=st.integers(1, 16),
        salt=st.sampled_from(["", "tenant"]),
        patience_s=st.sampled_from([1.0, 5.0, float("inf"), float("inf")]),
        prompt_logprobs=st.sampled_from([None, None, None, 1]),
    )
    def add(self, zeros: int, ones: int, salt: str, patience_s: float, prompt_logprobs: int | None) -> None:
        self._add([0] * zeros + [1] * ones, salt, patience_s, prompt_logprobs)

    @precondition(lambda self: self.computed_prompts)
    @rule(data=st.data(), more=st.integers(0, 6), salt=st.sampled_from([None, None, "", "tenant"]))
    def add_next_turn(self, data: st.DataObject, more: int, salt: str | None) -> None:
        token_ids, its_salt = data.draw(st.sampled_from(self.computed_prompts[-4:]))
        self._add([*token_ids, *range(more)], its_salt if salt is None else salt, float("inf"), None)

    def _add(self, token_ids: list[int], salt: str, patience_s: float, prompt_logprobs: int | None) -> None:
        request = GenerationRequest(
            request_id=str(self.num_added),
            token_ids=tuple(token_ids),
            sampling=SamplingParams(prompt_logprobs=prompt_logprobs),
            cache_salt=salt,
            deadline_s=self.now_s + patience_s,
        )
        sequence = Sequence(self.num_added, request, self.now_s)
        self.num_added += 1
        waiting = self.scheduler.counts().waiting
        try:
            self.scheduler.add(sequence)
        except ContextLengthError:
            assert len(token_ids) >= self.scheduler.max_model_len
        except OverloadedError:
            assert waiting == _MAX_QUEUE
        else:
            assert waiting < _MAX_QUEUE
            self.open[self.num_added - 1] = sequence

    @rule()
    def step(self) -> None:
        for sequence in self.scheduler.take_expired(self.now_s):
            assert sequence.request.deadline_s <= self.now_s
            assert sequence.state is SequenceState.FINISHED
            assert self.open.pop(int(sequence.request.request_id)) is sequence
        chunks = self.scheduler.next_batch(self.now_s)
        assert sum(chunk.num_tokens for chunk in chunks) <= self.max_batch_tokens
        assert len({chunk.sequence.key for chunk in chunks}) == len(chunks)
        running = [number for number, sequence in self.open.items() if sequence.state is SequenceState.RUNNING]
        waiting = [number for number, sequence in self.open.items() if sequence.state is SequenceState.WAITING]
        assert all(old < new for old in running for new in waiting), "a later one was started first"
        for chunk in chunks:
            sequence, salt = chunk.sequence, chunk.sequence.request.cache_salt
            assert chunk.num_tokens > 0
            assert sequence.num_cached < sequence.num_tokens
            assert sequence.num_cached == 0 or sequence.request.sampling.prompt_logprobs is None
            self.kv.check(sequence.block_table, sequence.token_ids, chunk.start, salt)
            end = chunk.start + chunk.num_tokens
            self.kv.write(sequence.block_table, sequence.token_ids, chunk.start, end, salt)
        for chunk in chunks:
            assert self.scheduler.computed(chunk)
            if chunk.is_last:
                self._hand_over(chunk.sequence)

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

    @rule(count=st.integers(2, 8))
    def several_steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    @rule(seconds=st.sampled_from([0.5, 1.0, 3.0]))
    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds

    @rule()
    def expire_leases(self) -> None:
        for lease in self.leases.expire(self.now_s):
            assert lease.expires_s <= self.now_s
            self.scheduler.release(self.held.pop(int(lease.request_id)))
        assert all(self.leases.find(str(number), 0, self.now_s) is not None for number in self.held)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.open)))
        sequence = self.open.pop(number)
        assert self.scheduler.cancel(number) is sequence
        assert sequence.block_table == []
        assert self.scheduler.cancel(number) is None

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

    @rule(count=st.integers(0, 4))
    def evict(self, count: int) -> None:
        before = self.pool.num_reclaimable
        assert self.index.evict(count) == min(count, before)

    @rule()
    def clear_cache(self) -> None:
        self.index.clear()
        assert self.pool.num_reclaimable == 0

    @invariant()
    def blocks_are_conserved(self) -> None:
        if hasattr(self, "pool"):
            self.scheduler.check_integrity(self.leases.block_tables())
            counts = count_blocks(self.pool, self.scheduler.block_tables(), self.leases.block_tables())
            assert counts.leaked == 0
            assert counts.free + counts.running + counts.cached + counts.leased == counts.total

    def teardown(self) -> None:
        """Whatever happened, all that is left gets its turn, and then nothing is held."""
        if not hasattr(self, "pool"):
            return
        for _ in range(sum(sequence.num_tokens for sequence in self.open.values()) + len(self.open)):
            self.step()
            self.now_s += 10.0
            self.expire_leases()
        assert not self.open
        self.now_s += 10.0
        self.expire_leases()
        assert not self.held
        self.blocks_are_conserved()
        assert self.scheduler.counts().waiting_tokens == 0
        assert self.pool.num_held == 0
        self.index.clear()
        assert self.pool.num_free == self.pool.num_blocks


TestPrefillMachine = PrefillMachine.TestCase
TestPrefillMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
