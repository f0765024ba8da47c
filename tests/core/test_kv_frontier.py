"""What a frontier has beyond an earlier one, against sets of blocks and layers."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tandem.core.kv_frontier import KvFrontier, StageFrontier, TransferChunk

MOST = 5


@st.composite
def stage_steps(draw: st.DrawFn, chunks: list[int]) -> list[StageFrontier]:
    """Two states of one stage, the second one not before the first."""
    num_layers = draw(st.integers(1, MOST))
    positions = sorted(draw(st.tuples(*2 * [st.integers(0, len(chunks) - 2)])))
    layers = sorted(draw(st.tuples(*2 * [st.integers(0, num_layers)])))
    if positions[0] < positions[1]:
        layers = draw(st.permutations(layers))
    return [
        StageFrontier(chunks[at], chunks[at + 1], done, num_layers) for at, done in zip(positions, layers, strict=True)
    ]


@st.composite
def growing(draw: st.DrawFn) -> tuple[KvFrontier, KvFrontier]:
    """Two states of one attempt, of one or several stages; the second one may be the end, when the layers of stages
    whose progress is not known are there, too. The first one may know the first stage only."""
    chunks = sorted(draw(st.sets(st.integers(0, MOST), min_size=2)))
    stages = [draw(stage_steps(chunks)) for _ in range(draw(st.integers(1, 3)))]
    earlier, later = (
        KvFrontier(1, first.blocks, first.next_blocks, first.layers, first.num_layers, tuple(others))
        for first, *others in zip(*stages, strict=True)
    )
    if draw(st.booleans()):
        earlier = replace(earlier, later=())
    if draw(st.booleans()):
        return earlier, KvFrontier.finished(1, chunks[-1], draw(st.integers(earlier.known_layers, 4 * MOST)))
    return earlier, later


def cells(chunk: TransferChunk) -> list[tuple[int, int]]:
    return [(layer, block) for layer in chunk.layers for block in chunk.blocks]


def computed(frontier: KvFrontier) -> set[tuple[int, int]]:
    found, begin = set(), 0
    for stage in frontier.stages:
        end = begin + stage.num_layers
        found.update(cells(TransferChunk(range(begin, end), range(stage.blocks))))
        done = range(begin, begin + stage.layers)
        found.update(cells(TransferChunk(done, range(stage.blocks, stage.next_blocks))))
        begin = end
    return found


@given(growing())
def test_what_is_new_comes_once_and_nothing_else(states: tuple[KvFrontier, KvFrontier]) -> None:
    earlier, later = states
    assert earlier.is_valid
    assert later.is_valid
    new = [cell for chunk in later.beyond(earlier) for cell in cells(chunk)]
    assert len(new) == len(set(new))
    assert set(new) == computed(later) - computed(earlier)
    assert {cell for chunk in later.beyond(KvFrontier()) for cell in cells(chunk)} == computed(later)
    assert later.beyond(later) == []


@given(growing(), st.data())
def test_only_what_is_computed_is_covered(states: tuple[KvFrontier, KvFrontier], data: st.DataObject) -> None:
    for frontier in states:
        layers, blocks = (
            range(*sorted(data.draw(st.tuples(st.integers(0, most), st.integers(0, most)))))
            for most in (3 * MOST + 1, MOST + 1)
        )
        chunk = TransferChunk(layers, blocks)
        assert frontier.covers(chunk) == (set(cells(chunk)) <= computed(frontier))
