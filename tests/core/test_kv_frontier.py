"""What a frontier has beyond an earlier one, against sets of blocks and layers."""

from hypothesis import given
from hypothesis import strategies as st

from tandem.core.kv_frontier import KvFrontier, TransferChunk

MOST = 5


@st.composite
def growing(draw: st.DrawFn) -> tuple[KvFrontier, KvFrontier]:
    """Two states of one attempt; the second one may be the end, when the layers of later stages are there, too."""
    num_layers = draw(st.integers(1, MOST))
    chunks = sorted(draw(st.sets(st.integers(0, MOST), min_size=2)))
    position = draw(st.integers(0, len(chunks) - 2))
    earlier = KvFrontier(1, chunks[position], chunks[position + 1], draw(st.integers(0, num_layers)), num_layers)
    if draw(st.booleans()):
        return earlier, KvFrontier.finished(1, chunks[-1], draw(st.integers(num_layers, MOST)))
    later = draw(st.integers(position, len(chunks) - 2))
    first = earlier.layers if later == position else 0
    return earlier, KvFrontier(1, chunks[later], chunks[later + 1], draw(st.integers(first, num_layers)), num_layers)


def cells(chunk: TransferChunk) -> list[tuple[int, int]]:
    return [(layer, block) for layer in chunk.layers for block in chunk.blocks]


def computed(frontier: KvFrontier) -> set[tuple[int, int]]:
    before = TransferChunk(range(frontier.num_layers), range(frontier.blocks))
    current = TransferChunk(range(frontier.layers), range(frontier.blocks, frontier.next_blocks))
    return {*cells(before), *cells(current)}


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
            range(*sorted(data.draw(st.tuples(st.integers(0, MOST + 1), st.integers(0, MOST + 1))))) for _ in range(2)
        )
        chunk = TransferChunk(layers, blocks)
        assert frontier.covers(chunk) == (set(cells(chunk)) <= computed(frontier))
