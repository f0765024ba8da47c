"""What an instance's loop is told, and what it says: values for and from other threads."""

from dataclasses import dataclass

from tandem.core.attempt_id import AttemptId
from tandem.core.session import BlockCounts, SessionEvent, Submit
from tandem.core.step_coefficients import StepCoefficients
from tandem.decode_worker.fetcher import Fetch, FetchFailed, KvArrived
from tandem.prefill_worker.held_kv import KvComputing, KvReady
from tandem.scheduling.budget import StepBudget
from tandem.scheduling.prefix_index import CacheChange


@dataclass(frozen=True, slots=True)
class SubmitAttempt:
    attempt_id: AttemptId
    command: Submit


@dataclass(frozen=True, slots=True)
class Release:
    """Give up the attempt in any phase; the blocks of held KV are no longer needed."""

    attempt_id: AttemptId


LoopCommand = SubmitAttempt | Release | KvArrived | FetchFailed | StepBudget


@dataclass(frozen=True, slots=True)
class SendEvent:
    """For the router of that session."""

    session_id: int
    event: SessionEvent


@dataclass(frozen=True, slots=True)
class CancelFetch:
    """The transfer is no longer wanted; answer with KvArrived or FetchFailed when the blocks are safe."""

    attempt_id: AttemptId


@dataclass(frozen=True, slots=True)
class CacheChanged:
    """The prefix cache holds other blocks than before."""

    changes: tuple[CacheChange, ...]


LoopEvent = SendEvent | KvComputing | KvReady | Fetch | CancelFetch | CacheChanged


@dataclass(frozen=True, slots=True)
class LoopReport:
    """What the loop last said of itself; replaced whole, never changed. Commands, steps and tokens are totals since the
    start. `is_empty`: no attempt is there, and no block is held for a reader or a transfer."""

    fingerprint: str
    weights_hash: str
    max_model_len: int
    block_size: int
    blocks: BlockCounts
    waiting_requests: int
    running_requests: int
    uncomputed_tokens: int
    unreserved_tokens: int
    steps: int
    step_s: float
    computed_tokens: int
    cached_tokens: int
    preemptions: int
    step_cost: StepCoefficients | None
    step_prompt_tokens: int
    num_commands: int
    is_empty: bool
