"""One attempt of one request on one worker: its tokens, its blocks, and the state it is in."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum

from tandem.core.request import FinishReason, GenerationRequest


class SequenceState(Enum):
    WAITING = "waiting"  # queued, holds no block
    RESERVED = "reserved"  # decode: holds blocks into which a transfer writes
    RUNNING = "running"  # takes part in steps
    PREEMPTED = "preempted"  # decode: lost its blocks, first in line to get new ones and recompute
    HELD = "held"  # prefill: computed, its blocks wait to be fetched; the worker owns them, not the scheduler
    FINISHED = "finished"  # holds nothing; the only state without an exit


_NEXT_STATES: dict[SequenceState, frozenset[SequenceState]] = {
    SequenceState.WAITING: frozenset({SequenceState.RUNNING, SequenceState.RESERVED, SequenceState.FINISHED}),
    SequenceState.RESERVED: frozenset({SequenceState.RUNNING, SequenceState.FINISHED}),
    SequenceState.RUNNING: frozenset({SequenceState.PREEMPTED, SequenceState.HELD, SequenceState.FINISHED}),
    SequenceState.PREEMPTED: frozenset({SequenceState.RUNNING, SequenceState.FINISHED}),
    SequenceState.HELD: frozenset({SequenceState.FINISHED}),
    SequenceState.FINISHED: frozenset(),
}


@dataclass(slots=True, eq=False)
class Sequence:
    """Mutable, owned by one worker's loop, equal only to itself.

    prefill   WAITING --first chunk--> RUNNING --last chunk--> HELD --fetched, lease over--> FINISHED

    decode    WAITING --blocks reserved--> RESERVED --KV arrived--> RUNNING --last token--> FINISHED
                                                                     |   ^
                                                       out of memory v   | recompute
                                                                   PREEMPTED

    colocated WAITING --admitted--> RUNNING --last token--> FINISHED, preempted as in decode

    Every state but FINISHED also goes to FINISHED by cancel, deadline or failure.

    `token_ids` starts as the request's tokens and grows by each generated one; `block_table[i]` holds the KV of tokens
    `[i * block_size, (i + 1) * block_size)`; the first `num_computed` tokens have their KV there. Of these the first
    `num_cached` came from the prefix cache. `block_hashes` is the hash chain of the leading full blocks, as far as it
    was needed (see `prefix_index`). `order` is the age among a decode scheduler's sequences, lower is older.
    """

    key: Hashable  # chosen by the worker, e.g. (session id, handle)
    request: GenerationRequest
    arrival_s: float
    token_ids: list[int] = field(init=False)
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0
    state: SequenceState = SequenceState.WAITING
    order: int = -1
    reserved_s: float | None = None  # decode: when it got its blocks
    committed_s: float | None = None  # decode: when its KV had arrived
    started_s: float | None = None  # when its first step was scheduled

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_generated(self) -> int:
        """Generated tokens of the whole request, those of earlier attempts included."""
        return len(self.token_ids) - self.request.num_prompt_tokens

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
        """Hand the blocks to the caller, who must release them; the sequence then has no KV."""
        block_ids, self.block_table = self.block_table, []
        self.num_computed = 0
        return block_ids

    def finish_reason_after(
        self, token_id: int, eos_token_ids: frozenset[int], max_model_len: int
    ) -> FinishReason | None:
        """Whether `token_id`, which has just been appended, ends the generation, and why."""
        assert self.token_ids[-1] == token_id, "append the token first"
        sampling = self.request.sampling
        if token_id in sampling.stop_token_ids or (token_id in eos_token_ids and not sampling.ignore_eos):
            return FinishReason.STOP
        if self.num_generated >= sampling.max_tokens or self.num_tokens >= max_model_len:
            return FinishReason.LENGTH
        return None
