"""A prefix cache by runs gives the same hits, evictions and memory as one block by block."""

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.request import SamplingParams
from tandem.core.request_slo import NO_SLO
from tandem.placement.simulator.counted import CountedSequence, counted_request
from tandem.placement.simulator.prefix_runs import PromptPath, RunIndex, RunPool
from tandem.placement.simulator.run_tracker import RunTracker, SharedBlocks
from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.budget import StepBudget
from tandem.scheduling.prefix_index import PrefixIndex
from tandem.scheduling.prefix_tracker import PrefixTracker
from tandem.scheduling.scheduler import Scheduler
from tandem.scheduling.sequence import Sequence

_BLOCK = 4


@dataclass(frozen=True)
class Prompt:
    group: int  # -1: none
    shared_blocks: int
    own_tokens: int
    output: int
    hand_over: bool
    held_for: int  # steps that another instance takes to fetch it


class Instance:
    """A scheduler, driven as by a worker's loop; tokens have no values. `by_runs`, or block by block."""

    def __init__(self, num_blocks: int, budget: StepBudget, *, by_runs: bool) -> None:
        self.pool: BlockPool = RunPool(num_blocks) if by_runs else BlockPool(num_blocks)
        self.index = RunIndex(self.pool, _BLOCK) if isinstance(self.pool, RunPool) else PrefixIndex(self.pool, _BLOCK)
        self.scheduler = Scheduler(budget, self.pool, self.index, 1000)
        self.held: list[tuple[int, Sequence]] = []
        self._by_runs = by_runs

    def add(self, row: int, prompt: Prompt) -> None:
        num_shared = prompt.shared_blocks if prompt.group >= 0 else 0
        num_tokens = num_shared * _BLOCK + prompt.own_tokens
        request = counted_request(row, num_tokens, 0, SamplingParams(max_tokens=prompt.output), NO_SLO)
        sequence = CountedSequence(row, request, 0.0, hand_over=prompt.hand_over)
        if self._by_runs:
            sequence.block_hashes = PromptPath(prompt.group, num_shared, row)  # type: ignore[assignment]
        else:
            num_blocks = (num_tokens + prompt.output) // _BLOCK
            shared = [b"%d/%d" % (prompt.group, i) for i in range(num_shared)]
            sequence.block_hashes = shared + [b"own %d/%d" % (row, i) for i in range(num_shared, num_blocks)]
        self.scheduler.add(sequence)

    def step(self, held_for: list[int]) -> list[tuple[object, int, int]]:
        """What was computed: (row, first token, number)."""
        self.held = [(left - 1, sequence) for left, sequence in self.held if not self._fetched(left, sequence)]
        chunks = self.scheduler.next_batch(0.0)
        for chunk in chunks:
            self.scheduler.computed(chunk)
            sequence = chunk.sequence
            assert isinstance(sequence.key, int)
            if chunk.samples and sequence.hand_over:
                self.held.append((held_for[sequence.key], sequence))
            elif chunk.samples:
                self.scheduler.generated(sequence.key, 0)
                if sequence.num_tokens >= self.scheduler.length_limit(sequence):
                    self.scheduler.finish(sequence.key)
        return [(chunk.sequence.key, chunk.start, chunk.num_tokens) for chunk in chunks]

    def _fetched(self, left: int, sequence: Sequence) -> bool:
        if left == 0:
            self.scheduler.release(sequence)
        return left == 0

    def numbers(self) -> tuple[object, ...]:
        pool = self.pool
        cached = self.index.num_blocks
        return self.scheduler.counts(), pool.num_free, pool.num_reclaimable, pool.num_held, cached


PROMPTS = st.builds(
    Prompt,
    group=st.integers(-1, 2),
    shared_blocks=st.integers(0, 6),
    own_tokens=st.integers(1, 14),
    output=st.integers(1, 12),
    hand_over=st.booleans(),
    held_for=st.integers(0, 4),
)


@settings(max_examples=150, deadline=None)
@given(
    prompts=st.lists(PROMPTS, min_size=1, max_size=24),
    steps_between=st.lists(st.integers(0, 4), min_size=24, max_size=24),
    cancelled=st.sets(st.integers(0, 23), max_size=4),
    cleared_at=st.integers(0, 60),
    num_blocks=st.integers(11, 30),
    max_tokens=st.integers(4, 24),
)
def test_runs_are_equal_to_blocks(
    prompts: list[Prompt],
    steps_between: list[int],
    cancelled: set[int],
    cleared_at: int,
    num_blocks: int,
    max_tokens: int,
) -> None:
    budget = StepBudget(8, max_tokens, max_tokens, 1 << 30, growth_horizon_tokens=4)
    both = [Instance(num_blocks, budget, by_runs=by_runs) for by_runs in (False, True)]
    held_for = [prompt.held_for for prompt in prompts]
    num_steps = 0

    def step() -> None:
        nonlocal num_steps
        num_steps += 1
        by_blocks, by_runs = (instance.step(held_for) for instance in both)
        assert by_runs == by_blocks
        assert both[1].numbers() == both[0].numbers()
        both[1].index.check_integrity()
        if num_steps == cleared_at:
            for instance in both:
                instance.index.clear()

    for row, prompt in enumerate(prompts):
        for instance in both:
            instance.add(row, prompt)
        for _ in range(steps_between[row]):
            step()
        if row in cancelled:
            for instance in both:
                instance.scheduler.cancel(row)
    while len(both[0].scheduler) or both[0].held:
        step()
        assert num_steps < 5000
    assert both[1].pool.num_held == both[0].pool.num_held == 0


@settings(max_examples=100, deadline=None)
@given(
    recorded=st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 2), st.integers(0, 9), st.sampled_from([100, 4, 8])),
        max_size=40,
    ),
    forgotten=st.dictionaries(st.integers(0, 40), st.sampled_from("abc"), max_size=3),
    max_blocks=st.integers(1, 15),
)
def test_a_router_s_estimate_by_runs_is_that_by_blocks(
    recorded: list[tuple[str, int, int, int]], forgotten: dict[int, str], max_blocks: int
) -> None:
    by_blocks, by_runs = PrefixTracker(4, max_blocks), RunTracker(4, max_blocks)
    for step, (instance_id, group, count, num_pool_blocks) in enumerate(recorded):
        for tracker in (by_blocks, by_runs):
            if step in forgotten:
                tracker.forget(forgotten[step])
            tracker.record(instance_id, SharedBlocks(group, count), num_pool_blocks)
        for asked_group in range(3):
            names = SharedBlocks(asked_group, 6)
            assert list(by_runs.holders(names)) == list(by_blocks.holders(names))
            for each in "abc":
                assert by_runs.matched_tokens(each, names) == by_blocks.matched_tokens(each, names)
                assert by_runs.num_blocks(each) == by_blocks.num_blocks(each)
