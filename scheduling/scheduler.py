"""What the schedulers have in common: the sequences that are here, their deadlines, and their length in blocks."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from tandem.core.errors import ContextLengthError
from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.keyed_heap import KeyedHeap
from tandem.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `[start, start + num_tokens)` of `sequence`, computed in one step."""

    sequence: Sequence
    start: int
    num_tokens: int


ChunkT = TypeVar("ChunkT", bound=Chunk)


class Scheduler(Generic[ChunkT]):
    """Sequences by key, from `_enter` until `_forget`. Who waits and who runs is the subclass's affair."""

    __slots__ = ("_block_size", "_computed_tokens", "_deadlines", "_pool", "_sequences", "max_model_len")

    def __init__(self, pool: BlockPool, block_size: int, max_model_len: int) -> None:
        """`max_model_len` counts prompt plus answer; the attribute of that name is less where the pool is smaller."""
        self._pool = pool
        self._block_size = block_size
        self.max_model_len = min(max_model_len, pool.num_blocks * block_size)
        self._sequences: dict[Hashable, Sequence] = {}
        self._deadlines: KeyedHeap[Hashable] = KeyedHeap()
        self._computed_tokens = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def get(self, key: Hashable) -> Sequence | None:
        return self._sequences.get(key)

    def length_limit(self, sequence: Sequence) -> int:
        """Tokens, prompt and answer together, with which it ends at the latest."""
        return min(sequence.request.max_total_tokens, self.max_model_len)

    def computed(self, chunk: ChunkT) -> bool:
        """The KV of `chunk` is in its blocks. False when the sequence is gone meanwhile: drop the chunk's result."""
        sequence = chunk.sequence
        if self._sequences.get(sequence.key) is not sequence:
            return False
        assert chunk.start == sequence.num_computed, "a chunk computed twice, or out of order"
        sequence.num_computed += chunk.num_tokens
        self._computed_tokens += chunk.num_tokens
        return True

    def _check_length(self, sequence: Sequence) -> None:
        """Raises ContextLengthError if there is no room for `sequence` and one more token, however idle the worker."""
        if sequence.num_tokens >= self.max_model_len:
            raise ContextLengthError(
                f"The prompt has {sequence.num_tokens} tokens; this model takes at most {self.max_model_len} tokens,"
                " prompt and answer together."
            )

    def _enter(self, sequence: Sequence) -> None:
        assert sequence.key not in self._sequences, f"{sequence.key!r} is scheduled already"
        self._sequences[sequence.key] = sequence
        if sequence.request.deadline_s != float("inf"):
            self._deadlines.push(sequence.key, sequence.request.deadline_s)

    def _forget(self, sequence: Sequence) -> None:
        del self._sequences[sequence.key]
        self._deadlines.discard(sequence.key)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _grown_blocks(self, sequence: Sequence, growth_tokens: int) -> int:
        """Blocks that it holds when it has grown by so many tokens, or up to its limit, if that is less."""
        num_tokens = sequence.num_tokens
        return self._blocks_for(max(num_tokens, min(num_tokens + growth_tokens, self.length_limit(sequence))))
