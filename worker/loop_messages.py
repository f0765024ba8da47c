"""Commands and events of an instance's loop: values that other threads send and receive."""

from dataclasses import dataclass

from tandem.core.attempt_id import AttemptId
from tandem.core.session import SessionEvent, Submit
from tandem.decode_worker.fetcher import Fetch, FetchFailed, KvArrived
from tandem.prefill_worker.held_kv import KvComputing, KvReady
from tandem.scheduling.budget import StepBudget
from tandem.scheduling.prefix_index import CacheChange


@dataclass(frozen=True, slots=True)
class SubmitAttempt:
    """Begin an attempt."""

    attempt_id: AttemptId
    command: Submit


@dataclass(frozen=True, slots=True)
class Release:
    """End the attempt in any phase, or free its held KV, which was fetched or is no longer needed."""

    attempt_id: AttemptId


LoopCommand = SubmitAttempt | Release | KvArrived | FetchFailed | StepBudget


@dataclass(frozen=True, slots=True)
class SendEvent:
    """An event for the router of that session."""

    session_id: int
    event: SessionEvent


@dataclass(frozen=True, slots=True)
class CancelFetch:
    """End the transfer. KvArrived or FetchFailed follows when nothing writes into the blocks any more."""

    attempt_id: AttemptId


@dataclass(frozen=True, slots=True)
class CacheChanged:
    """The content of the prefix cache has changed."""

    changes: tuple[CacheChange, ...]


LoopEvent = SendEvent | KvComputing | KvReady | Fetch | CancelFetch | CacheChanged
