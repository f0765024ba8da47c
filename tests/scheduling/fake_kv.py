"""KV memory for tests: each slot remembers which prefix its value was computed from."""

from collections.abc import Sequence as Items

Value = tuple[str, tuple[int, ...]]  # salt, and the tokens up to and including this one


class FakeKv:
    """Reads and writes as an engine would, and fails when a step would attend to KV that is not its own prefix's."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._slots: list[Value | None] = [None] * (num_blocks * block_size)

    def _slot(self, block_table: Items[int], position: int) -> int:
        return block_table[position // self._block_size] * self._block_size + position % self._block_size

    def write(self, block_table: Items[int], token_ids: Items[int], start: int, end: int, salt: str = "") -> None:
        for position in range(start, end):
            self._slots[self._slot(block_table, position)] = (salt, tuple(token_ids[: position + 1]))

    def check(self, block_table: Items[int], token_ids: Items[int], end: int, salt: str = "") -> None:
        for position in range(end):
            found = self._slots[self._slot(block_table, position)]
            assert found == (salt, tuple(token_ids[: position + 1])), f"position {position} holds the KV of {found}"
