"""One attempt of one request on one instance: its tokens, its blocks and its state."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum

from tandem.core.request import FinishReason, GenerationRequest


class SequenceState(Enum):
    WAITING = "waiting"  # queued, holds no block
    RECEIVING = "receiving"  # holds blocks into which a transfer writes
    RUNNING = "running"  # takes part in steps
    PREEMPTED = "preempted"  # has lost its blocks, and recomputes its KV once it is admitted again
    HELD = "held"  # its prompt is computed, and its blocks wait for a reader; owned by the worker, not the scheduler
    FINISHED = "finished"  # holds nothing; final


_NEXT_STATES: dict[SequenceState, frozenset[SequenceState]] = {
    SequenceState.WAITING: frozenset({SequenceState.RUNNING, SequenceState.RECEIVING, SequenceState.FINISHED}),
    SequenceState.RECEIVING: frozenset({SequenceState.RUNNING, SequenceState.FINISHED}),
    SequenceState.RUNNING: frozenset({SequenceState.PREEMPTED, SequenceState.HELD, SequenceState.FINISHED}),
    SequenceState.PREEMPTED: frozenset({SequenceState.RUNNING, SequenceState.FINISHED}),
    SequenceState.HELD: frozenset({SequenceState.FINISHED}),
    SequenceState.FINISHED: frozenset(),
}


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable, owned by one instance's loop, and equal only to itself.

        WAITING --blocks--> RUNNING (prompt in chunks) --last chunk--> RUNNING (decoding) --last token--> FINISHED
           |                   |  ^                |
           |     out of memory v  | admitted       | last chunk, `hand_over`
           |                 PREEMPTED             +--> HELD --acknowledged, or the lease has ended--> FINISHED
           |
           +--blocks, `is_remote`--> RECEIVING --KV committed--> RUNNING (decoding)

    Every state but FINISHED also goes to FINISHED by cancel, deadline or failure.

    `token_ids` are the request's tokens and each generated one. `block_table[i]` is the block with the KV of tokens
    `[i * block_size, (i + 1) * block_size)`. The KV of the first `num_computed` tokens is there, or will be after the
    `num_under_way` steps with this sequence that are computed now; that of the first `num_cached` came from the prefix
    cache. `block_hashes` are the names of the leading full blocks, as far as they were needed (`prefix_index`). `order`
    is the age among the scheduler's sequences; lower is older.
    """

    key: Hashable  # the worker's name for the attempt
    request: GenerationRequest
    arrival_s: float
    is_remote: bool = False  # the KV of its tokens comes from another instance
    hand_over: bool = False  # its KV goes to another instance
    token_ids: list[int] = field(init=False)
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0
    num_under_way: int = 0
    state: SequenceState = SequenceState.WAITING
    order: int = -1
    started_s: float | None = None  # when its first prompt chunk was scheduled
    committed_s: float | None = None  # when its KV had arrived
    first_token_s: float | None = None  # when the attempt's first token was sampled here, or came with the KV

    def __post_init__(self) -> None:
        assert not (self.is_remote and self.hand_over), "KV that came from elsewhere is not handed over"
        self.token_ids = list(self.request.token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_generated(self) -> int:
        """Generated tokens of the whole request, those of earlier attempts included."""
        return len(self.token_ids) - self.request.num_prompt_tokens

    @property
    def has_first_token(self) -> bool:
        """Whether the attempt's first token was sampled, here or on the instance that computed the KV."""
        return self.num_tokens > len(self.request.token_ids)

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    def move_to(self, state: SequenceState) -> None:
        assert state in _NEXT_STATES[self.state], f"a sequence cannot go from {self.state.value} to {state.value}"
        self.state = state

    def append(self, token_id: int) -> None:
        self.token_ids.append(token_id)

    def extend(self, token_ids: list[int]) -> None:
        self.token_ids.extend(token_ids)

    def take_blocks(self) -> list[int]:
        """Hand the blocks to the caller, who has to release them. The sequence has no KV afterwards."""
        block_ids, self.block_table = self.block_table, []
        self.num_computed = 0
        return block_ids

    def finish_reason_after(
        self, token_id: int, eos_token_ids: frozenset[int], max_model_len: int
    ) -> FinishReason | None:
        """Why `token_id`, which was appended last, ends the generation; None if it does not."""
        assert self.token_ids[-1] == token_id, "append the token first"
        sampling = self.request.sampling
        if token_id in sampling.stop_token_ids or (token_id in eos_token_ids and not sampling.ignore_eos):
            return FinishReason.STOP
        if self.num_generated >= sampling.max_tokens or self.num_tokens >= max_model_len:
            return FinishReason.LENGTH
        return None
