"""Applies the output of a step to its sequences: they get their tokens, end, or are held for another instance."""

from collections import defaultdict

from tandem.core.attempt_id import AttemptId
from tandem.core.clock import Clock
from tandem.core.request import FinishReason, SampledToken, TokenLogprob
from tandem.core.session import NewTokens, PrefillFinished, TokenFrame
from tandem.engine.engine import Engine
from tandem.engine.step import StepOutput
from tandem.prefill_worker.held_kv import KvReady
from tandem.scheduling.chunk import Chunk
from tandem.scheduling.scheduler import Scheduler
from tandem.scheduling.sequence import Sequence
from tandem.worker.kept_blocks import KeptBlocks
from tandem.worker.loop_events import LoopEvents
from tandem.worker.loop_messages import SendEvent
from tandem.worker.loop_values import attempt_of, manifest_of
from tandem.worker.step_pipeline import LaunchedStep


class OutputProcessor:
    """Used by the loop, which handles failed chunks first.

    last chunk of a prompt -> PrefillFinished; then the sequence decodes, is held (KvReady), or has ended
    decoding sequences     -> one TokenFrame for each session, with the tokens of all its attempts
    """

    def __init__(
        self, engine: Engine, scheduler: Scheduler, kept: KeptBlocks, events: LoopEvents, clock: Clock
    ) -> None:
        self._layout = engine.layout
        self._eos_token_ids = frozenset(engine.spec.eos_token_ids)
        self._max_model_len = engine.capacity().max_model_len
        self._scheduler = scheduler
        self._kept = kept
        self._events = events
        self._clock = clock
        self._prompt_logprobs: dict[AttemptId, list[TokenLogprob | None]] = {}  # of prompts in progress

    def take(self, step: LaunchedStep, output: StepOutput) -> None:
        """Skips chunks with an error in `output`."""
        frames: defaultdict[int, list[NewTokens]] = defaultdict(list)
        for index, chunk in enumerate(step.chunks):
            if output.errors[index] is not None:
                continue
            sequence = chunk.sequence
            is_first = chunk.samples and not sequence.has_first_token
            if not self._scheduler.computed(chunk):
                continue  # the attempt has ended during the step
            if (logprobs := output.prompt_logprobs[index]) is not None:
                self._add_prompt_logprobs(chunk, logprobs)
            token = output.tokens[index]
            assert (token is not None) == chunk.samples, "the engine samples exactly the requested tokens"
            if token is None:
                continue
            if is_first:
                self._prefilled(sequence, token)
            else:
                frames[attempt_of(sequence).session_id].append(self._decoded(sequence, token, step.launched_s))
        for session_id, items in frames.items():
            self._events.add(SendEvent(session_id, TokenFrame(tuple(items))))

    def forget(self, attempt_id: AttemptId) -> None:
        """The attempt has ended."""
        self._prompt_logprobs.pop(attempt_id, None)

    def _add_prompt_logprobs(self, chunk: Chunk, logprobs: list[TokenLogprob]) -> None:
        attempt_id = attempt_of(chunk.sequence)
        if chunk.start == 0:  # also when a preempted prompt is computed again
            self._prompt_logprobs[attempt_id] = [None]  # the first token has no log-probability
        self._prompt_logprobs[attempt_id].extend(logprobs)

    def _prefilled(self, sequence: Sequence, token: SampledToken) -> None:
        """`token` is the first one of the attempt."""
        attempt_id = attempt_of(sequence)
        manifest = None
        if sequence.hand_over:
            manifest = manifest_of(sequence, token, self._layout)  # the new token has no KV
            sequence.append(token.token_id)
        else:
            self._scheduler.generated(attempt_id, token.token_id)
        sequence.first_token_s = self._clock.now_s()
        reason = self._finish_reason(sequence, token)
        logprobs = self._prompt_logprobs.pop(attempt_id, None)
        assert sequence.started_s is not None, "a finished prompt was started"
        finished = PrefillFinished(
            handle=attempt_id.handle,
            token=token,
            prompt_logprobs=None if logprobs is None else tuple(logprobs),
            finish_reason=reason,
            num_cached_tokens=sequence.num_cached,
            compute_s=sequence.first_token_s - sequence.started_s,
        )
        self._events.send(attempt_id, finished)
        if manifest is not None and reason is None:
            self._kept.hold(attempt_id, sequence)
            self._events.add(KvReady(attempt_id, manifest))
        elif manifest is not None:
            self._scheduler.release(sequence)
        elif reason is not None:
            self._scheduler.finish(attempt_id)

    def _decoded(self, sequence: Sequence, token: SampledToken, launched_s: float) -> NewTokens:
        attempt_id = attempt_of(sequence)
        queue_s = None
        if sequence.committed_s is not None:  # the first step after the transfer
            queue_s, sequence.committed_s = launched_s - sequence.committed_s, None
        self._scheduler.generated(attempt_id, token.token_id)
        reason = self._finish_reason(sequence, token)
        if reason is not None:
            self._scheduler.finish(attempt_id)
        return NewTokens(attempt_id.handle, (token,), reason, queue_s)

    def _finish_reason(self, sequence: Sequence, token: SampledToken) -> FinishReason | None:
        return sequence.finish_reason_after(token.token_id, self._eos_token_ids, self._max_model_len)
