"""The decode loop: take arrived KV -> schedule -> step -> emit. Sole owner of the instance's sequences and blocks.

    Open -> waiting -> blocks reserved -> [Fetch: the transfer writes into them] -> Arrived -> running -> finished
               |             |                                                        |           |
             Close         Close: the blocks are quarantined until the transfer     Close       Close
                           has left them, since it may still be writing

The transfer runs on the event loop and its own threads (`decode_worker/service.py`); a step never waits for it.
"""

import logging
from collections import defaultdict
from dataclasses import dataclass

from tandem.core.clock import Clock
from tandem.core.config import DecodeSection
from tandem.core.errors import DeadlineError, TandemError, UnavailableError
from tandem.core.request import SampledToken
from tandem.core.session import (
    DecodeEvent,
    DecodeFrame,
    DecodeReserved,
    DecodeTokens,
    KvSource,
    OpenDecode,
    RequestFailed,
    TransferCommitted,
)
from tandem.core.transfer import Transport
from tandem.engine.engine import Engine
from tandem.engine.step import SampleRequest, SequenceSlice, StepOutput
from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.decode import DecodeChunk, DecodePolicy, DecodeScheduler
from tandem.scheduling.integrity import count_blocks
from tandem.scheduling.sequence import Sequence, SequenceState
from tandem.worker.admission import check_request
from tandem.worker.attempt_key import Key, key_of
from tandem.worker.instance import REPORT_EVERY_S, LoopReport

log = logging.getLogger(__name__)


# --- commands --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Open:
    key: Key
    command: OpenDecode


@dataclass(frozen=True, slots=True)
class Close:
    """Give up the attempt in whatever phase it is."""

    key: Key


@dataclass(frozen=True, slots=True)
class Arrived:
    """The KV is whole, verified and acknowledged: it is ours."""

    key: Key
    first_token: SampledToken
    transfer_s: float
    transfer_bytes: int
    transport: Transport


@dataclass(frozen=True, slots=True)
class FetchFailed:
    """The transfer failed, or was abandoned, and nothing writes into the blocks any more."""

    key: Key
    error: TandemError


LoopCommand = Open | Close | Arrived | FetchFailed


# --- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tell:
    """For the router of `session_id`."""

    session_id: int
    event: DecodeEvent


@dataclass(frozen=True, slots=True)
class Fetch:
    """Blocks are reserved: bring the KV of these tokens into them."""

    key: Key
    request_id: str
    epoch: int
    token_ids: tuple[int, ...]
    source: KvSource
    block_ids: tuple[int, ...]
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Abandon:
    """The transfer of `key` is no longer wanted; answer with Arrived or FetchFailed when the blocks are safe."""

    key: Key


LoopEvent = Tell | Fetch | Abandon


class DecodeLoop:
    """A `worker.loop_thread.StepLoop`. Not thread-safe: one thread turns it."""

    def __init__(self, engine: Engine, section: DecodeSection, clock: Clock) -> None:
        capacity = engine.capacity()
        self._engine = engine
        self._clock = clock
        self._max_model_len = capacity.max_model_len
        self._eos_token_ids = frozenset(engine.spec.eos_token_ids)
        self._pool = BlockPool(capacity.num_blocks)
        policy = DecodePolicy(section.max_batch, section.max_queue)
        self._scheduler = DecodeScheduler(policy, self._pool, capacity.block_size, capacity.max_model_len)
        self._sources: dict[Key, KvSource] = {}  # of sequences that wait for blocks
        self._quarantine: dict[Key, list[int]] = {}  # blocks that an abandoned transfer may still write
        self._events: list[LoopEvent] = []
        self._chunks: list[DecodeChunk] = []
        self._steps = 0
        self._step_s = 0.0
        self._reported_s = 0.0
        self.report = self._make_report()

    # --- StepLoop ---

    def apply(self, command: LoopCommand) -> None:
        match command:
            case Open(key, opened):
                self._open(key, opened)
            case Close(key):
                self._close(key)
            case Arrived():
                self._arrived(command)
            case FetchFailed(key, error):
                self._fetch_failed(key, error)

    def prepare(self) -> bool:
        now_s = self._clock.now_s()
        for sequence in self._scheduler.expired(now_s):
            self._give_up(sequence)
            self._fail(key_of(sequence), DeadlineError("the deadline passed before the answer was complete"))
        for sequence in self._scheduler.reserve(now_s):
            self._fetch(sequence)
        self._chunks = self._scheduler.next_batch(now_s)
        if now_s - self._reported_s >= REPORT_EVERY_S:
            self.report = self._make_report()
            self._reported_s = now_s
        return bool(self._chunks)

    def compute(self) -> None:
        started_s = self._clock.now_s()
        try:
            output = self._engine.step([self._slice(chunk) for chunk in self._chunks])
        except (RuntimeError, MemoryError):  # torch's; out of memory most of all. The next batch may fit.
            log.exception("a decode step of %d sequences failed", len(self._chunks))
            for chunk in self._chunks:
                self._scheduler.cancel(chunk.sequence.key)
                self._fail(
                    key_of(chunk.sequence), UnavailableError("the decode step failed; the worker's log says why")
                )
        else:
            self._take_output(output, started_s)
        self._steps += 1
        self._step_s += self._clock.now_s() - started_s

    def idle(self) -> None:
        if len(self._scheduler) == 0:  # O(blocks): only when there is time
            self._scheduler.check_integrity(self._quarantine.values())
        self.report = self._make_report()

    def take_events(self) -> list[LoopEvent]:
        events, self._events = self._events, []
        return events

    # --- an attempt's life ---

    def _open(self, key: Key, opened: OpenDecode) -> None:
        try:
            check_request(opened.request, self._engine.spec)
            self._scheduler.add(Sequence(key=key, request=opened.request, arrival_s=self._clock.now_s()))
        except TandemError as error:
            self._fail(key, error)
        else:
            self._sources[key] = opened.source

    def _fetch(self, sequence: Sequence) -> None:
        key, request = key_of(sequence), sequence.request
        self._tell(key, DecodeReserved(key.handle))
        self._events.append(
            Fetch(
                key=key,
                request_id=request.request_id,
                epoch=request.epoch,
                token_ids=request.token_ids,
                source=self._sources.pop(key),
                block_ids=tuple(sequence.block_table),
                deadline_s=request.deadline_s,
            )
        )

    def _arrived(self, arrived: Arrived) -> None:
        key = arrived.key
        if (block_ids := self._quarantine.pop(key, None)) is not None:
            self._pool.release(block_ids)  # given up while it arrived
            return
        now_s = self._clock.now_s()
        self._scheduler.committed(key, arrived.first_token.token_id, now_s)
        self._tell(
            key, TransferCommitted(key.handle, arrived.transfer_s, arrived.transfer_bytes, arrived.transport.value)
        )

    def _fetch_failed(self, key: Key, error: TandemError) -> None:
        if (block_ids := self._quarantine.pop(key, None)) is not None:
            self._pool.release(block_ids)
            return
        self._scheduler.cancel(key)
        self._fail(key, error)

    def _close(self, key: Key) -> None:
        if (sequence := self._scheduler.get(key)) is not None:
            self._give_up(sequence)

    def _give_up(self, sequence: Sequence) -> None:
        """Free it now; if its transfer may still be writing, as soon as the transfer has left the blocks."""
        key = key_of(sequence)
        self._sources.pop(key, None)
        if sequence.state is SequenceState.RESERVED:
            self._quarantine[key] = self._scheduler.detach(key)
            self._events.append(Abandon(key))
        else:
            self._scheduler.cancel(key)

    def _fail(self, key: Key, error: TandemError) -> None:
        """The scheduler has let go of it already."""
        self._tell(key, RequestFailed(key.handle, error.code, error.message))

    def _take_output(self, output: StepOutput, started_s: float) -> None:
        frames: defaultdict[int, list[DecodeTokens]] = defaultdict(list)
        for index, chunk in enumerate(self._chunks):
            sequence, key = chunk.sequence, key_of(chunk.sequence)
            if (error := output.errors[index]) is not None:
                self._scheduler.cancel(key)
                self._fail(key, error)
                continue
            self._scheduler.computed(chunk)
            if (token := output.tokens[index]) is None:
                assert not chunk.samples, "the engine draws what it is asked for"
                continue
            is_first = sequence.num_tokens == len(sequence.request.token_ids) + 1
            self._scheduler.generated(key, token.token_id)
            reason = sequence.finish_reason_after(token.token_id, self._eos_token_ids, self._max_model_len)
            if reason is not None:
                self._scheduler.finish(key)
            queue_s = started_s - sequence.committed_s if is_first and sequence.committed_s is not None else None
            frames[key.session_id].append(DecodeTokens(key.handle, (token,), reason, queue_s))
        step_s = self._clock.now_s() - started_s
        self._events.extend(Tell(session_id, DecodeFrame(tuple(items), step_s)) for session_id, items in frames.items())

    # --- helpers ---

    def _slice(self, chunk: DecodeChunk) -> SequenceSlice:
        sequence = chunk.sequence
        request, tokens = sequence.request, sequence.token_ids
        sample = None
        if chunk.samples:
            sample = SampleRequest(request.sampling, len(tokens), tokens, request.num_prompt_tokens)
        end = chunk.start + chunk.num_tokens
        return SequenceSlice(tokens[chunk.start : end], chunk.start, sequence.block_table, sample)

    def _tell(self, key: Key, event: DecodeEvent) -> None:
        self._events.append(Tell(key.session_id, event))

    def _make_report(self) -> LoopReport:
        counts = self._scheduler.counts()
        running = [*self._scheduler.block_tables(), *self._quarantine.values()]
        return LoopReport(
            fingerprint=self._engine.layout.fingerprint,
            max_model_len=self._max_model_len,
            block_size=self._engine.layout.block_size,
            blocks=count_blocks(self._pool, running),
            waiting_requests=counts.waiting,
            running_requests=counts.reserved + counts.running + counts.preempted,
            waiting_tokens=counts.waiting_tokens,
            steps=self._steps,
            step_s=self._step_s,
            computed_tokens=counts.computed_tokens,
            preemptions=counts.preemptions,
        )
