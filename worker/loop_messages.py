"""What an instance's loop is told, and what it says: values for and from other threads."""

from dataclasses import dataclass

from tandem.core.attempt_id import AttemptId
from tandem.core.session import SessionEvent, Submit
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
