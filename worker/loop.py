"""The loop of an instance: schedule -> launch -> collect -> emit. Sole owner of the instance's sequences and blocks.

    Submit -> waiting -> prompt in chunks -> decoding -> finished
       |                        |
       |                        +-> last chunk, hand over -> held (KvReady) -> Release -> blocks free, or cached
       |                        +-> each chunk, hand over -> KvComputing: the reader of the KV may begin
       |
       +- remote KV -> blocks reserved -> [Fetch: a transfer writes into them] -> KvArrived -> decoding

Release ends an attempt in any phase. Blocks into which a transfer may still write are fenced until the transfer has
ended. Transfers run on the event loop and on their own threads (`decode_worker/fetcher.py`), and leases on held KV
are decided on the event loop (`prefill_worker/held_kv.py`): a step waits for neither.
"""

import logging
import math

from tandem.core.attempt_id import AttemptId
from tandem.core.clock import Clock
from tandem.core.errors import DeadlineError, InvalidRequestError, TandemError, UnavailableError
from tandem.core.session import KvReserved, KvSource, PrefillStarted, Submit
from tandem.core.step_coefficients import StepCoefficients
from tandem.decode_worker.fetcher import FetchFailed, KvArrived
from tandem.engine.engine import Engine
from tandem.engine.models.base import LayerHook
from tandem.engine.step import StepOutput
from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.budget import StepBudget
from tandem.scheduling.chunk import Chunk
from tandem.scheduling.predictor import StepPredictor
from tandem.scheduling.prefix_index import PrefixIndex
from tandem.scheduling.scheduler import Scheduler
from tandem.scheduling.sequence import Sequence, SequenceState
from tandem.worker.kept_blocks import KeptBlocks
from tandem.worker.loop_events import LoopEvents
from tandem.worker.loop_messages import CacheChanged, CancelFetch, LoopCommand, LoopEvent, Release, SubmitAttempt
from tandem.worker.loop_report import LoopReport, make_report
from tandem.worker.loop_values import attempt_of, committed_event, fetch_of, kv_computing
from tandem.worker.output_processor import OutputProcessor
from tandem.worker.step_pipeline import LaunchedStep, StepPipeline, step_size

log = logging.getLogger(__name__)

REPORT_EVERY_S = 0.1  # time between two reports of a busy loop
CHECK_SHARE = 0.01  # share of time that self-checks take at most
MAX_FAILED_STEPS = 3  # after this number in a row the process ends, so that it is replaced


class InstanceLoop:
    """Has no thread: `worker.loop_thread` or a test calls it. Not thread-safe.

    One turn:  apply(command)...; if prepare(): launch(); if nothing was launched or is_full: collect()
    """

    def __init__(
        self,
        engine: Engine,
        budget: StepBudget,
        clock: Clock,
        *,
        prefix_cache: bool,
        step_cost: StepCoefficients | None = None,
        records_cache_changes: bool = False,
        layer_computed: LayerHook | None = None,
    ) -> None:
        """`step_cost`: prior of the predicted step times; None: no predictions. `records_cache_changes`: changes of the
        prefix cache are events. `layer_computed`: see `Engine.launch`; only for steps with prompts that are handed
        over."""
        capacity = engine.capacity()
        self._engine = engine
        self._clock = clock
        self._max_model_len = capacity.max_model_len
        self._pool = BlockPool(capacity.num_blocks)
        self._index = PrefixIndex(
            self._pool, capacity.block_size, enabled=prefix_cache, records_changes=records_cache_changes
        )
        self._layer_computed = layer_computed
        self._predictor = None if step_cost is None else StepPredictor(step_cost)
        self._steps = StepPipeline(engine, clock, self._predictor)
        self._scheduler = Scheduler(
            budget, self._pool, self._index, capacity.max_model_len, self._predictor, engine.num_stages
        )
        self._sources: dict[AttemptId, KvSource] = {}  # of remote sequences that wait for blocks
        self._kept = KeptBlocks(self._pool)
        self._events = LoopEvents()
        self._outputs = OutputProcessor(engine, self._scheduler, self._kept, self._events, clock)
        self._chunks: list[Chunk] = []
        self._prepared_step = 0  # number of the step with these chunks, in the engine
        self._failed_steps = 0
        self._num_commands = 0
        self._reported_s = 0.0
        self._check_s = -math.inf  # earliest time of the next self-check
        self.report = self._make_report()

    # --- one turn ----------------------------------------------------------------------------------------------------

    def apply(self, command: LoopCommand) -> None:
        self._num_commands += 1
        match command:
            case SubmitAttempt(attempt_id, submit):
                self._submit(attempt_id, submit)
            case Release(attempt_id):
                self._release(attempt_id)
            case KvArrived():
                self._arrived(command)
            case FetchFailed(attempt_id, error):
                self._fetch_failed(attempt_id, error)
            case StepBudget():
                self._scheduler.set_budget(command)

    def prepare(self) -> bool:
        """Schedule the next step; call it only if the loop is not `is_full`. False: there is nothing to compute now."""
        now_s = self._clock.now_s()
        for sequence in self._scheduler.expired(now_s):
            self._give_up(sequence)
            self._events.fail(attempt_of(sequence), DeadlineError("the deadline passed before the answer was complete"))
        if reserved := self._scheduler.reserve():
            while self._steps and not self._engine.is_settled:
                self.collect()
            self._engine.settle()  # the transfers write into blocks that steps may have used
            for sequence in reserved:
                self._fetch(sequence)
        self._chunks = self._scheduler.next_batch(now_s)
        self._prepared_step = self._engine.next_step
        for chunk in self._chunks:
            self._announce(chunk)
        if now_s - self._reported_s >= REPORT_EVERY_S:
            self.report = self._make_report()
            self._reported_s = now_s
        return bool(self._chunks)

    @property
    def step_size(self) -> int:
        """Size of the largest step that is under way or was scheduled by `prepare`, as `worker/progress.py` counts."""
        return max(self._steps.largest_size, step_size(self._chunks))

    @property
    def has_steps(self) -> bool:
        """Whether a step is under way."""
        return len(self._steps) > 0

    @property
    def is_full(self) -> bool:
        """Whether the oldest step has to be collected before another one."""
        return self._steps.is_full

    def launch(self) -> None:
        """Begin the step that `prepare` scheduled."""
        chunks, self._chunks = self._chunks, []
        assert self._engine.next_step == self._prepared_step, "readers were told of another step"
        self._scheduler.launched(chunks)
        hands_over = any(chunk.sequence.hand_over for chunk in chunks)
        try:
            self._steps.launch(chunks, self._layer_computed if hands_over else None)
        except (RuntimeError, MemoryError) as error:  # from torch, mostly for lack of memory: the next batch may fit
            self._step_failed(chunks, error)

    def collect(self) -> None:
        """Wait for the oldest step under way, and take its results. No effect without one."""
        if self._steps:
            step, output = self._steps.collect()
            if isinstance(output, Exception):
                self._step_failed(step.chunks, output)
            else:
                self._failed_steps = 0
                self._take_output(step, output)

    def idle(self) -> None:
        """Called once when the loop has been idle for a moment: the time for self-checks."""
        now_s = self._clock.now_s()
        if len(self._scheduler) == 0 and now_s >= self._check_s:  # O(blocks), and a new request would have to wait
            self._scheduler.check_integrity(self._kept.tables())
            ended_s = self._clock.now_s()
            self._check_s = ended_s + (ended_s - now_s) / CHECK_SHARE
        self.report = self._make_report()

    def take_events(self) -> list[LoopEvent]:
        """Events since the last call."""
        if changes := self._index.take_changes():
            self._events.add(CacheChanged(tuple(changes)))
        return self._events.take()

    # --- an attempt's life -------------------------------------------------------------------------------------------

    def _submit(self, attempt_id: AttemptId, submit: Submit) -> None:
        request, vocab_size = submit.request, self._engine.spec.vocab_size
        sequence = Sequence(
            key=attempt_id,
            request=request,
            arrival_s=self._clock.now_s(),
            is_remote=submit.kv is not None,
            hand_over=submit.hand_over,
        )
        try:
            # An invalid token id would fail a step, and with it all other sequences of the step.
            if min(request.token_ids) < 0 or max(request.token_ids) >= vocab_size:
                raise InvalidRequestError(f"The prompt has token ids outside of [0, {vocab_size}), the model's range.")
            self._scheduler.add(sequence)
        except TandemError as error:
            self._events.fail(attempt_id, error)
            return
        if submit.kv is not None:
            self._sources[attempt_id] = submit.kv

    def _fetch(self, sequence: Sequence) -> None:
        attempt_id = attempt_of(sequence)
        self._events.send(attempt_id, KvReserved(attempt_id.handle))
        self._events.add(fetch_of(sequence, self._sources.pop(attempt_id)))

    def _arrived(self, arrived: KvArrived) -> None:
        attempt_id = arrived.attempt_id
        if self._kept.lift_fence(attempt_id):
            return  # the attempt has ended meanwhile
        self._scheduler.committed(attempt_id, arrived.first_token.token_id, self._clock.now_s())
        self._events.send(attempt_id, committed_event(arrived))

    def _fetch_failed(self, attempt_id: AttemptId, error: TandemError) -> None:
        if not self._kept.lift_fence(attempt_id):
            self._scheduler.cancel(attempt_id)
            self._events.fail(attempt_id, error)

    def _announce(self, chunk: Chunk) -> None:
        """The chunk is in the next step: tell the router of its attempt, and the reader of its KV."""
        sequence, attempt_id = chunk.sequence, attempt_of(chunk.sequence)
        if chunk.begins_prefill:
            self._events.send(attempt_id, PrefillStarted(attempt_id.handle, sequence.num_cached))
        if sequence.hand_over:
            self._events.add(kv_computing(chunk, self._engine.layout, self._prepared_step))

    def _release(self, attempt_id: AttemptId) -> None:
        if (held := self._kept.end_hold(attempt_id)) is not None:
            self._scheduler.release(held)
        elif (sequence := self._scheduler.get(attempt_id)) is not None:
            self._give_up(sequence)

    def _give_up(self, sequence: Sequence) -> None:
        """End the sequence, and free its blocks: at once, or when the transfer that may still write into them ends."""
        attempt_id = attempt_of(sequence)
        self._sources.pop(attempt_id, None)
        self._outputs.forget(attempt_id)
        if sequence.state is SequenceState.RECEIVING:
            self._kept.fence(attempt_id, self._scheduler.detach(attempt_id))
            self._events.add(CancelFetch(attempt_id))
        else:
            self._scheduler.cancel(attempt_id)

    def _step_failed(self, chunks: list[Chunk], error: Exception) -> None:
        log.error("a step of %d sequences failed", len(chunks), exc_info=error)
        for chunk in chunks:
            self._fail_chunk(chunk, UnavailableError("the step failed; the instance's log says why"))
        self._failed_steps += 1
        if self._failed_steps == MAX_FAILED_STEPS:
            raise error

    def _fail_chunk(self, chunk: Chunk, error: TandemError) -> None:
        """The step of the chunk has ended, and the chunk has no result."""
        sequence = chunk.sequence
        if sequence.state is SequenceState.RUNNING:  # else the attempt has ended during the step
            self._give_up(sequence)
            self._events.fail(attempt_of(sequence), error)
        self._scheduler.computed(chunk)

    def _take_output(self, step: LaunchedStep, output: StepOutput) -> None:
        failed = [(chunk, error) for chunk, error in zip(step.chunks, output.errors, strict=True) if error is not None]
        if failed:
            self._index.clear()  # a cached block may hold the values that made the result not finite
        for chunk, error in failed:
            self._fail_chunk(chunk, error)
        self._outputs.take(step, output)

    def _make_report(self) -> LoopReport:
        return make_report(
            self._engine,
            self._scheduler,
            self._pool,
            self._kept,
            self._steps,
            max_model_len=self._max_model_len,
            step_cost=None if self._predictor is None else self._predictor.coefficients,
            num_commands=self._num_commands,
        )
