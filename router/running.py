"""One running request: what its consumer iterates. The routing machine carries it over its attempts.

A request has no task of its own: events of instances, its consumer and the machine's timer drive it. What a slow
consumer leaves waiting is bounded by the request's own `max_tokens`.
"""

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from tandem.core.errors import OverloadedError, TandemError
from tandem.core.request import FinishReason, GenerationRequest, SampledToken, TokenLogprob
from tandem.core.session import NewTokens, PrefillFinished, TransferCommitted
from tandem.core.timeline import Timeline
from tandem.router.records import AttemptRecord, RequestRecord, explanation
from tandem.router.timeline_recorder import TimelineRecorder
from tandem.router.token_gaps import TokenGaps
from tandem.scheduling.routed_request import Attempt, RoutedRequest
from tandem.scheduling.routing import Selection

if TYPE_CHECKING:
    from tandem.router.dispatch import Dispatcher


class RunningRequest:
    """Implements `core.generation.Generation`.

    A consumer that ends it early because it has what it wants (a stop string) sets `finish_reason` before `aclose`;
    otherwise an early `aclose` counts as cancelled.
    """

    routed: RoutedRequest  # the machine's

    def __init__(
        self, dispatcher: "Dispatcher", request: GenerationRequest, received_s: float, admitted_s: float
    ) -> None:
        self.request = request
        self.finish_reason: FinishReason | None = None
        self.prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
        self.timeline_recorder = TimelineRecorder(received_s, admitted_s)
        self._dispatcher = dispatcher
        self._attempts: list[tuple[Attempt, AttemptRecord]] = []
        self._attempt_request = request  # of the last attempt
        self._early_tokens: list[NewTokens] = []  # they have overtaken the first one of the attempt
        self._output_ids: list[int] = []  # of all attempts
        self._waiting: list[SampledToken] = []  # not yet handed on
        self._num_handed_on = 0
        self._last_reason: FinishReason | None = None  # came with the last token
        self._consumer: asyncio.Future[None] | None = None
        self._token_gaps = TokenGaps()
        self._end: FinishReason | TandemError | None = None
        self._is_closed = False

    @property
    def has_tokens(self) -> bool:
        return bool(self._output_ids)

    # --- consumer ----------------------------------------------------------------------------------------------------

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[SampledToken, ...]:
        while not self._waiting:
            if self._is_closed:
                raise StopAsyncIteration
            if isinstance(self._end, TandemError):
                self._close()
                raise self._end
            self._consumer = asyncio.get_running_loop().create_future()
            try:
                await self._consumer
            finally:
                self._consumer = None
        tokens = tuple(self._waiting)
        self._waiting.clear()
        self._num_handed_on += len(tokens)
        if isinstance(self._end, FinishReason):
            self.finish_reason = self._end
            self._close()
        return tokens

    async def aclose(self) -> None:
        """Drop what is left of it, here and at the instances. May be called in any phase, and again."""
        if self._is_closed:
            return
        if not isinstance(self._end, TandemError):
            self.finish_reason = self.finish_reason or FinishReason.CANCELLED
            self._dispatcher.give_up(self, self.finish_reason)
        self._waiting.clear()
        self._close()

    def timeline(self) -> Timeline:
        return self.timeline_recorder.timeline(
            num_prompt_tokens=self.request.num_prompt_tokens,
            num_output_tokens=self._num_handed_on,
            num_attempts=max(1, len(self._attempts)),
        )

    def explanation(self) -> str:
        return explanation([record for _, record in self._attempts])

    def record(self) -> RequestRecord:
        """The record of the ended request."""
        error = self._end if isinstance(self._end, TandemError) else None
        reason = self.finish_reason or FinishReason.CANCELLED
        for attempt, record in self._attempts:
            if record.failure is None and attempt.error is not None:
                record.failure = attempt.error.code
        return RequestRecord(
            request_id=self.request.request_id,
            outcome=reason.value if error is None else error.code,
            message=None if error is None else error.message,
            timeline=self.timeline(),
            attempts=tuple(record for _, record in self._attempts),
            slo=self.request.slo,
            token_gaps=self._token_gaps,
            predicted_ttft_s=self.routed.predicted_ttft_s,
            demoted_because=self.routed.demoted_because,
            refused_because=error.reason if isinstance(error, OverloadedError) else None,
            tenant=self.routed.client,
            trace=self.request.trace,
            sampling=None if self.request.trace is None else self.request.sampling,
        )

    # --- attempts ----------------------------------------------------------------------------------------------------

    def begin_attempt(
        self, attempt: Attempt, instance_id: str, selection: Selection, now_s: float
    ) -> GenerationRequest:
        """The request of a new attempt, which continues after the prompt and all tokens generated so far."""
        request, sampling = replace(self.request, slo=attempt.request.effective_slo), self.request.sampling
        if self._attempts:
            if self._output_ids and sampling.prompt_logprobs is not None:
                sampling = replace(sampling, prompt_logprobs=None)  # the consumer has them already
            request = replace(
                request,
                token_ids=(*request.token_ids, *self._output_ids),
                num_output_tokens=request.num_output_tokens + len(self._output_ids),
                sampling=sampling,
                epoch=request.epoch + len(self._attempts),
            )
        record = AttemptRecord(request.epoch, instance_id, selection, has_both_phases=not attempt.hand_over)
        if self.request.trace is not None:
            record.began_s = now_s
        self._attempts.append((attempt, record))
        self._attempt_request = request
        self._early_tokens.clear()
        self.timeline_recorder.begin_attempt(now_s)
        return request

    def begin_decode(self, instance_id: str, selection: Selection, now_s: float) -> GenerationRequest:
        """What to send to the instance that decodes. Where another one has not fetched the KV, it counts as another
        attempt, though the prompt is not computed again."""
        attempt, record = self._attempts[-1]
        if record.decode_id is not None:
            assert attempt.reader_error is not None, "the machine says why the first one does not read it"
            record.failure = attempt.reader_error.code
            record = replace(record, failure=None, began_s=None if record.began_s is None else now_s)
            self._attempts.append((attempt, record))
        record.decode_id, record.decode_selection = instance_id, selection
        return self._attempt_request

    def add_first_token(self, event: PrefillFinished, now_s: float) -> None:
        """The first token of an attempt has arrived."""
        self.timeline_recorder.first_token(event, now_s)
        if not self._output_ids:
            self.prompt_logprobs = event.prompt_logprobs
        self._add((event.token,), event.finish_reason, now_s)

    def add_transfer(self, event: TransferCommitted, now_s: float) -> None:
        self.timeline_recorder.transfer_committed(event, now_s)
        _, record = self._attempts[-1]
        record.transport, record.transfer_s = event.transport, event.transfer_s
        record.transfer_bytes, record.streamed_bytes = event.transfer_bytes, event.streamed_bytes

    def hold_tokens(self, item: NewTokens) -> None:
        """Hold tokens until the first token of the attempt has arrived."""
        self._early_tokens.append(item)

    def take_early_tokens(self) -> list[NewTokens]:
        early, self._early_tokens = self._early_tokens, []
        return early

    def add_tokens(self, item: NewTokens, now_s: float) -> None:
        """Tokens after the attempt's first one have arrived."""
        if item.queue_s is not None:
            self.timeline_recorder.decode_admitted(item.queue_s, now_s)
        self._add(item.tokens, item.finish_reason, now_s)

    def end(self, end: FinishReason | TandemError | None) -> None:
        """The request has ended on all instances. None: its last token has arrived."""
        self._end = end or self._last_reason
        assert self._end is not None, "a request has all its tokens when one of them says so"
        self._wake_consumer()

    def _add(self, tokens: tuple[SampledToken, ...], finish_reason: FinishReason | None, now_s: float) -> None:
        self._token_gaps.delivered(now_s)
        had_second = len(self._output_ids) > 1
        self._output_ids.extend([token.token_id for token in tokens])
        self._waiting.extend(tokens)
        self._last_reason = finish_reason
        if not had_second and len(self._output_ids) > 1:
            self.timeline_recorder.second_token(now_s)
        self._wake_consumer()

    # --- end ---------------------------------------------------------------------------------------------------------

    def _close(self) -> None:
        self._is_closed = True
        self.timeline_recorder.finished(self._dispatcher.now_s())
        self._wake_consumer()
        self._dispatcher.closed(self)

    def _wake_consumer(self) -> None:
        if self._consumer is not None and not self._consumer.done():
            self._consumer.set_result(None)
