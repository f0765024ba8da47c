"""What is announced of a later pipeline stage has been written there, in whatever order the events come."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from tandem.core.attempt_id import AttemptId
from tandem.core.clock import ManualClock
from tandem.core.transfer import ComputedKv
from tandem.prefill_worker.held_kv import HeldKv, KvComputing, StageStep

LAYERS = (2, 3)  # of the first and of the second stage
NUM_BLOCKS = 6
ATTEMPTS = 2


class Pipeline:
    """Chunks of attempts go through two stages, the second one some steps behind. Blocks are names here: an attempt
    that starts with cached blocks has those of an earlier one."""

    def __init__(self) -> None:
        self.held = HeldKv(lambda attempt_id: None, 10.0, ManualClock())
        self.block_ids: dict[int, list[tuple[int, int]]] = {}  # of an attempt
        self.computed = dict.fromkeys(range(ATTEMPTS), 0)  # blocks of an attempt that went through the first stage
        self.steps: list[Sequence[tuple[int, int]]] = []  # blocks that each step writes
        self.at = StageStep(0, LAYERS[1])  # where the second stage is
        self.written: set[tuple[int, tuple[int, int]]] = set()  # layers of blocks, by the second stage
        for attempt in range(ATTEMPTS):
            self.held.open(AttemptId(0, attempt), f"r{attempt}", 0)

    def compute(self, attempt: int, num_cached: int, length: int) -> None:
        """The first stage computes a chunk, as far as there are blocks."""
        is_first = attempt not in self.block_ids
        if is_first:
            other = self.block_ids.get(1 - attempt, [])[: min(num_cached, self.computed[1 - attempt])]
            own = [(attempt, position) for position in range(len(other), NUM_BLOCKS)]
            self.block_ids[attempt], self.computed[attempt] = [*other, *own], len(other)
        begin = self.computed[attempt]
        end = self.computed[attempt] = min(begin + length, NUM_BLOCKS)
        if begin == end:
            return
        self.steps.append(self.block_ids[attempt][begin:end])
        blocks = tuple(range(NUM_BLOCKS))
        event = KvComputing(AttemptId(0, attempt), blocks, 16, is_first, begin, end, len(self.steps), LAYERS)
        self.held.computing(event)

    def advance(self) -> None:
        """The second stage computes a layer, or begins its next step."""
        if self.at.layers < LAYERS[1]:
            self.written.update((self.at.layers, block) for block in self.steps[self.at.step - 1])
            self.at = StageStep(self.at.step, self.at.layers + 1)
        elif self.at.step < len(self.steps):
            self.at = StageStep(self.at.step + 1, 0)

    def check(self) -> None:
        for attempt in self.block_ids:
            if self.computed[attempt]:
                kv = self.held.readable(f"r{attempt}", 0)
                assert isinstance(kv, ComputedKv)
                (stage,) = kv.frontier.later
                for position, block in enumerate(self.block_ids[attempt]):
                    assert all((layer, block) in self.written for layer in range(stage.layers_of(position)))


@given(st.data())
def test_nothing_is_announced_before_it_is_written(data: st.DataObject) -> None:
    pipeline = Pipeline()
    pipeline.held._streamed.update((f"r{attempt}", 0) for attempt in range(ATTEMPTS))
    chunks = st.tuples(st.integers(0, ATTEMPTS - 1), st.integers(0, NUM_BLOCKS - 1), st.integers(1, 3))
    for action in data.draw(st.lists(st.sampled_from(["compute", "advance", "advance", "tell"]), max_size=50)):
        if action == "compute":
            pipeline.compute(*data.draw(chunks))
        elif action == "advance":
            pipeline.advance()
        else:
            pipeline.held.stage_computed(1, pipeline.at)
        pipeline.check()
