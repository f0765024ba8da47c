"""The prefill loop: schedule -> step -> hold for decode. Sole owner of the instance's sequences and blocks.

    Submit -> waiting -> computing -> last chunk done -> held (under a lease) -> Release -> blocks free, or cached
                 |           |              |
              Cancel      Cancel       answer complete (one token wanted, or end of sequence): nothing to hold

Whether a lease still counts is decided on the event loop (`prefill_worker/service.py`), so that an acknowledgement
never waits for a step; the loop frees the blocks when it is told.
"""

import logging
from dataclasses import dataclass, field

from tandem.core.clock import Clock
from tandem.core.config import PrefillSection
from tandem.core.errors import DeadlineError, TandemError, UnavailableError
from tandem.core.request import SampledToken, TokenLogprob
from tandem.core.session import (
    PrefillEvent,
    PrefillFinished,
    PrefillStarted,
    RequestFailed,
    SubmitPrefill,
)
from tandem.core.transfer import Manifest, hash_token_ids
from tandem.engine.engine import Engine
from tandem.engine.step import SampleRequest, SequenceSlice, StepOutput
from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.integrity import count_blocks
from tandem.scheduling.prefill import PrefillChunk, PrefillPolicy, PrefillScheduler
from tandem.scheduling.prefix_index import PrefixIndex
from tandem.scheduling.sequence import Sequence
from tandem.worker.admission import check_request
from tandem.worker.attempt_key import Key, key_of
from tandem.worker.instance import REPORT_EVERY_S, LoopReport

log = logging.getLogger(__name__)


# --- commands --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submit:
    key: Key
    command: SubmitPrefill


@dataclass(frozen=True, slots=True)
class Release:
    """Give up the attempt in whatever phase it is; a finished one's blocks are no longer needed."""

    key: Key


LoopCommand = Submit | Release


# --- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tell:
    """For the router of `session_id`."""

    key: Key
    event: PrefillEvent


@dataclass(frozen=True, slots=True)
class Hold:
    """The attempt's KV is complete and stays until `Release`."""

    key: Key
    manifest: Manifest


LoopEvent = Tell | Hold


@dataclass(slots=True)
class _Attempt:
    sequence: Sequence
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=lambda: [None])


class PrefillLoop:
    """A `worker.loop_thread.StepLoop`. Not thread-safe: one thread turns it."""

    def __init__(self, engine: Engine, section: PrefillSection, clock: Clock) -> None:
        capacity = engine.capacity()
        self._engine = engine
        self._clock = clock
        self._max_model_len = capacity.max_model_len
        self._eos_token_ids = frozenset(engine.spec.eos_token_ids)
        self._pool = BlockPool(capacity.num_blocks)
        prefix_index = PrefixIndex(self._pool, capacity.block_size, enabled=section.prefix_cache)
        policy = PrefillPolicy(section.max_batch_tokens, section.max_queue)
        self._scheduler = PrefillScheduler(
            policy, self._pool, prefix_index, capacity.block_size, capacity.max_model_len
        )
        self._attempts: dict[Key, _Attempt] = {}  # until the last chunk is computed
        self._held: dict[Key, Sequence] = {}  # from then until Release
        self._events: list[LoopEvent] = []
        self._chunks: list[PrefillChunk] = []
        self._steps = 0
        self._step_s = 0.0
        self._reported_s = 0.0
        self.report = self._make_report()

    # --- StepLoop ---

    def apply(self, command: LoopCommand) -> None:
        match command:
            case Submit(key, submit):
                self._submit(key, submit)
            case Release(key):
                self._release(key)

    def prepare(self) -> bool:
        now_s = self._clock.now_s()
        for sequence in self._scheduler.take_expired(now_s):
            self._fail(sequence, DeadlineError("the deadline passed while the prompt waited to be computed"))
        self._chunks = self._scheduler.next_batch(now_s)
        for chunk in self._chunks:
            sequence = chunk.sequence
            if chunk.start == sequence.num_cached:
                self._tell(sequence, PrefillStarted(key_of(sequence).handle, sequence.num_cached))
        if now_s - self._reported_s >= REPORT_EVERY_S:
            self.report = self._make_report()
            self._reported_s = now_s
        return bool(self._chunks)

    def compute(self) -> None:
        started_s = self._clock.now_s()
        try:
            output = self._engine.step([self._slice(chunk) for chunk in self._chunks])
        except (RuntimeError, MemoryError):  # torch's; out of memory most of all. The next batch may fit.
            log.exception("a prefill step of %d sequences failed", len(self._chunks))
            for chunk in self._chunks:
                self._scheduler.cancel(chunk.sequence.key)
                self._fail(chunk.sequence, UnavailableError("the prefill step failed; the worker's log says why"))
        else:
            self._take_output(output)
        self._steps += 1
        self._step_s += self._clock.now_s() - started_s

    def idle(self) -> None:
        if not self._attempts:  # O(blocks): only when there is time
            self._scheduler.check_integrity(sequence.block_table for sequence in self._held.values())
        self.report = self._make_report()

    def take_events(self) -> list[LoopEvent]:
        events, self._events = self._events, []
        return events

    # --- an attempt's life ---

    def _submit(self, key: Key, submit: SubmitPrefill) -> None:
        sequence = Sequence(key=key, request=submit.request, arrival_s=self._clock.now_s())
        try:
            check_request(submit.request, self._engine.spec)
            self._scheduler.add(sequence)
        except TandemError as error:
            self._fail(sequence, error)
        else:
            self._attempts[key] = _Attempt(sequence)

    def _release(self, key: Key) -> None:
        if (sequence := self._held.pop(key, None)) is not None:
            self._scheduler.release(sequence)
        elif self._attempts.pop(key, None) is not None:
            self._scheduler.cancel(key)

    def _fail(self, sequence: Sequence, error: TandemError) -> None:
        """The scheduler has let go of it already."""
        self._attempts.pop(key_of(sequence), None)
        self._tell(sequence, RequestFailed(key_of(sequence).handle, error.code, error.message))

    def _take_output(self, output: StepOutput) -> None:
        for index, chunk in enumerate(self._chunks):
            sequence = chunk.sequence
            if (error := output.errors[index]) is not None:
                self._scheduler.cancel(sequence.key)
                self._fail(sequence, error)
                continue
            self._scheduler.computed(chunk)
            attempt = self._attempts[key_of(sequence)]
            if (logprobs := output.prompt_logprobs[index]) is not None:
                attempt.prompt_logprobs.extend(logprobs)
            if chunk.is_last:
                token = output.tokens[index]
                assert token is not None, "the last chunk of a prompt draws a token"
                self._finish(attempt, token)

    def _finish(self, attempt: _Attempt, token: SampledToken) -> None:
        sequence, now_s = attempt.sequence, self._clock.now_s()
        key = key_of(sequence)
        del self._attempts[key]
        manifest = self._manifest(sequence, token)  # of the tokens whose KV there is: without the new one
        sequence.append(token.token_id)
        reason = sequence.finish_reason_after(token.token_id, self._eos_token_ids, self._max_model_len)
        wants_logprobs = sequence.request.sampling.prompt_logprobs is not None
        assert sequence.started_s is not None, "what is finished was started"
        finished = PrefillFinished(
            handle=key.handle,
            token=token,
            prompt_logprobs=tuple(attempt.prompt_logprobs) if wants_logprobs else None,
            finish_reason=reason,
            num_cached_tokens=sequence.num_cached,
            queue_s=sequence.started_s - sequence.arrival_s,
            compute_s=now_s - sequence.started_s,
        )
        self._tell(sequence, finished)
        if reason is None:
            self._held[key] = sequence
            self._events.append(Hold(key, manifest))
        else:
            self._scheduler.release(sequence)

    # --- helpers ---

    def _slice(self, chunk: PrefillChunk) -> SequenceSlice:
        sequence = chunk.sequence
        request, tokens = sequence.request, sequence.token_ids
        end = chunk.start + chunk.num_tokens
        wanted = request.sampling.prompt_logprobs
        sample = None
        if chunk.is_last:
            sample = SampleRequest(request.sampling, len(tokens), tokens, request.num_prompt_tokens)
        return SequenceSlice(
            token_ids=tokens[chunk.start : end],
            start=chunk.start,
            block_table=sequence.block_table,
            sample=sample,
            prompt_logprobs=wanted,
            next_token_id=tokens[end] if wanted is not None and end < len(tokens) else None,
        )

    def _manifest(self, sequence: Sequence, first_token: SampledToken) -> Manifest:
        layout = self._engine.layout
        num_blocks = layout.blocks_for(sequence.num_tokens)
        return Manifest(
            request_id=sequence.request.request_id,
            epoch=sequence.request.epoch,
            num_tokens=sequence.num_tokens,
            token_hash=hash_token_ids(sequence.token_ids),
            block_ids=tuple(sequence.block_table[:num_blocks]),
            fingerprint=layout.fingerprint,
            bytes_per_layer=num_blocks * 2 * layout.segment_bytes,
            first_token=first_token,
        )

    def _tell(self, sequence: Sequence, event: PrefillEvent) -> None:
        self._events.append(Tell(key_of(sequence), event))

    def _make_report(self) -> LoopReport:
        counts = self._scheduler.counts()
        leased = [sequence.block_table for sequence in self._held.values()]
        return LoopReport(
            fingerprint=self._engine.layout.fingerprint,
            max_model_len=self._max_model_len,
            block_size=self._engine.layout.block_size,
            blocks=count_blocks(self._pool, self._scheduler.block_tables(), leased),
            waiting_requests=counts.waiting,
            running_requests=counts.running,
            waiting_tokens=counts.waiting_tokens,
            steps=self._steps,
            step_s=self._step_s,
            computed_tokens=counts.computed_tokens,
            cached_tokens=counts.cached_tokens,
        )
