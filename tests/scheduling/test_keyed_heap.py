from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.scheduling.keyed_heap import KeyedHeap

_OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["push", "push", "discard", "pop", "pop_until"]), st.integers(0, 9), st.integers(0, 5)),
    max_size=60,
)


@settings(deadline=None, max_examples=100)
@given(_OPERATIONS)
def test_behaves_like_a_sorted_list(operations: list[tuple[str, int, int]]) -> None:
    heap: KeyedHeap[int] = KeyedHeap()
    model: dict[int, tuple[int, int]] = {}  # key -> (priority, when pushed)
    for when, (name, key, priority) in enumerate(operations):
        line = sorted(model, key=lambda k: model[k])
        if name == "push":
            heap.push(key, priority)
            model[key] = (priority, when)
        elif name == "discard":
            heap.discard(key)
            model.pop(key, None)
        elif name == "pop" and model:
            assert heap.pop() == line[0]
            del model[line[0]]
        elif name == "pop_until":
            due = [k for k in line if model[k][0] <= priority]
            assert heap.pop_until(priority) == due
            for k in due:
                del model[k]
        assert len(heap) == len(model)
        first = min(model, key=lambda k: model[k], default=None)
        assert heap.peek() == (None if first is None else (model[first][0], first))


def test_dropped_entries_do_not_pile_up() -> None:
    heap: KeyedHeap[int] = KeyedHeap()
    heap.push(-1, 0.0)
    for key in range(10_000):
        heap.push(key, 1.0)
        heap.discard(key)
    assert len(heap) == 1
    assert len(heap._heap) <= 65
