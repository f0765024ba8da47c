"""One running request: what its consumer iterates, and what carries it over its attempts.

    start -> attempt -> ... tokens ... -> ended -> closed
                ^  |
                |  v  a worker is lost: continue from the prompt and the tokens that are here already
              recovering

Everything happens in the calls of workers' events, of the consumer and of two timers: no task belongs to a request.
What a slow consumer leaves waiting is bounded by the request's own `max_tokens`.
"""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, Self

from tandem.core.clock import Clock
from tandem.core.errors import (
    DeadlineError,
    IncompatiblePeerError,
    InternalError,
    OverloadedError,
    TandemError,
    TransferError,
    UnavailableError,
)
from tandem.core.request import FinishReason, GenerationRequest, SampledToken, TokenLogprob
from tandem.core.session import PrefillFinished
from tandem.core.timeline import Timeline
from tandem.router.attempt import Attempt
from tandem.router.choices import Chosen
from tandem.router.instances import Instance
from tandem.router.records import RequestRecord
from tandem.router.stamps import Stamps

_RETRIED = (UnavailableError, TransferError, OverloadedError, IncompatiblePeerError)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """`resume` allows a new attempt after tokens were handed on. `patience_s` is how long a request waits for a usable
    pair of workers when it has lost its own; `pause_s`, before it goes back to an instance that failed it."""

    max_attempts: int = 3
    resume: bool = True
    patience_s: float = 1.0
    pause_s: float = 0.05


class Desk(Protocol):
    """What a running request needs of the dispatcher."""

    clock: Clock
    handles: Iterator[int]
    retry: RetryPolicy

    def choose_prefill(self, request: GenerationRequest, avoid: frozenset[str]) -> Chosen:
        """Prefers others than `avoid`. Raises UnavailableError or ContextLengthError."""
        ...

    def choose_decode(self, request: GenerationRequest, prefill: Instance, avoid: frozenset[str]) -> Chosen: ...

    def ended(self, request: "RunningRequest") -> None:
        """Nothing of it runs on any worker any more."""
        ...

    def closed(self, record: RequestRecord) -> None:
        """Its consumer has had the last of it."""
        ...


class RunningRequest:
    """Implements `core.generation.Generation`, and `AttemptOwner` for its attempts.

    A consumer that ends it early because it has what it wants (a stop string) sets `finish_reason` before `aclose`;
    otherwise an early `aclose` counts as cancelled.
    """

    def __init__(self, desk: Desk, request: GenerationRequest, received_s: float) -> None:
        self.request = request
        self.finish_reason: FinishReason | None = None
        self.prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
        self.stamps = Stamps(received_s, desk.clock.now_s())
        self._desk = desk
        self._attempt: Attempt | None = None
        self._attempts: list[Attempt] = []
        self._avoid: frozenset[str] = frozenset()
        self._give_up_s = float("inf")
        self._retry_timer: asyncio.TimerHandle | None = None
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._output_ids: list[int] = []  # of all attempts
        self._waiting: list[SampledToken] = []  # not yet handed on
        self._num_handed_on = 0
        self._consumer: asyncio.Future[None] | None = None
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
        """Drop what is left of it, here and on the workers. May be called in any phase, and again."""
        if self._is_closed:
            return
        if self._attempt is not None:
            self._attempt.cancel()
        if not isinstance(self._end, TandemError):
            self.finish_reason = self.finish_reason or FinishReason.CANCELLED
            self._finish(self.finish_reason)
        self._waiting.clear()
        self._close()

    def timeline(self) -> Timeline:
        return self.stamps.timeline(
            num_prompt_tokens=self.request.num_prompt_tokens,
            num_output_tokens=self._num_handed_on,
            num_attempts=max(1, len(self._attempts)),
        )

    # --- attempts ----------------------------------------------------------------------------------------------------

    def start(self, prefill: Chosen) -> None:
        """Begin the first attempt. Needs a running event loop."""
        remaining_s = self.request.deadline_s - self.now_s()
        self._deadline_timer = asyncio.get_running_loop().call_later(remaining_s, self._on_deadline)
        self._begin(self.request, prefill)

    def abort(self, error: TandemError) -> None:
        """End it from outside with an error, unless it has ended."""
        if self._end is None:
            if self._attempt is not None:
                self._attempt.cancel()
            self._finish(error)

    def now_s(self) -> float:
        return self._desk.clock.now_s()

    def choose_decode(self, request: GenerationRequest, prefill: Instance) -> Chosen:
        return self._desk.choose_decode(request, prefill, self._avoid)

    def first_token(self, event: PrefillFinished) -> None:
        self.stamps.first_token(event, self.now_s())
        if not self._output_ids:
            self.prompt_logprobs = event.prompt_logprobs

    def new_tokens(self, tokens: tuple[SampledToken, ...], finish_reason: FinishReason | None) -> None:
        if self._end is not None:
            return
        had_second = len(self._output_ids) > 1
        self._output_ids.extend([token.token_id for token in tokens])
        if len(self._output_ids) > self.request.sampling.max_tokens:
            self.abort(InternalError("a worker sent more tokens than were asked for"))
            return
        self._waiting.extend(tokens)
        if not had_second and len(self._output_ids) > 1:
            self.stamps.second_token(self.now_s())
        if finish_reason is not None:
            self._finish(finish_reason)
        else:
            self._wake_consumer()

    def attempt_failed(self, error: TandemError, blamed: frozenset[str]) -> None:
        if self._end is not None:
            return
        self._avoid |= blamed
        retry = self._desk.retry
        if not isinstance(error, _RETRIED):
            self._finish(error)
        elif len(self._attempts) >= retry.max_attempts or (self._output_ids and not retry.resume):
            self._finish(self._final(error))
        else:
            self._give_up_s = self.now_s() + retry.patience_s
            self._recover(error, paused=False)

    def _begin(self, request: GenerationRequest, prefill: Chosen) -> None:
        self._attempt = Attempt(self, request, prefill, self._desk.handles)
        self._attempts.append(self._attempt)
        self.stamps.begin_attempt(self.now_s())
        self._attempt.start()

    def _continued(self) -> GenerationRequest:
        """The next attempt's request: prompt and generated tokens go in, what follows them comes out."""
        sampling = self.request.sampling
        if self._output_ids and sampling.prompt_logprobs is not None:
            sampling = replace(sampling, prompt_logprobs=None)  # the consumer has them already
        return replace(
            self.request,
            token_ids=(*self.request.token_ids, *self._output_ids),
            num_output_tokens=self.request.num_output_tokens + len(self._output_ids),
            sampling=sampling,
            epoch=self.request.epoch + len(self._attempts),
        )

    def _recover(self, error: TandemError, *, paused: bool) -> None:
        """Begin another attempt: at once if a worker is there that has not failed it, else after a pause."""
        try:
            request = self._continued()
            prefill = self._desk.choose_prefill(request, self._avoid)
        except UnavailableError as unavailable:
            if self.now_s() >= self._give_up_s:
                self._finish(self._final(unavailable))
            else:
                self._recover_after_pause(error)
            return
        except TandemError as other:
            self._finish(other)
            return
        if paused or prefill.instance.instance_id not in self._avoid:
            self._begin(request, prefill)
        elif isinstance(error, OverloadedError) and not self._output_ids:
            self._finish(error)  # every worker's queue is full: the client should know, rather than wait here too
        else:
            self._recover_after_pause(error)

    def _recover_after_pause(self, error: TandemError) -> None:
        recover = partial(self._recover, error, paused=True)
        self._retry_timer = asyncio.get_running_loop().call_later(self._desk.retry.pause_s, recover)

    # --- end ---------------------------------------------------------------------------------------------------------

    def _final(self, error: TandemError) -> TandemError:
        """What the consumer is told of the last of several failures."""
        if isinstance(error, UnavailableError) or (isinstance(error, OverloadedError) and not self._output_ids):
            return error
        return UnavailableError(error.message)

    def _on_deadline(self) -> None:
        self.abort(DeadlineError("the request's deadline has passed"))

    def _finish(self, end: FinishReason | TandemError) -> None:
        """The one end of the request; only the first counts."""
        if self._end is None:
            self._end = end
            for timer in (self._deadline_timer, self._retry_timer):
                if timer is not None:
                    timer.cancel()
            self._desk.ended(self)
        self._wake_consumer()

    def _close(self) -> None:
        self._is_closed = True
        self.stamps.finished(self.now_s())
        self._wake_consumer()
        error = self._end if isinstance(self._end, TandemError) else None
        reason = self.finish_reason or FinishReason.CANCELLED
        self._desk.closed(
            RequestRecord(
                request_id=self.request.request_id,
                outcome=reason.value if error is None else error.code,
                message=None if error is None else error.message,
                timeline=self.timeline(),
                attempts=tuple(attempt.record for attempt in self._attempts),
            )
        )

    def _wake_consumer(self) -> None:
        if self._consumer is not None and not self._consumer.done():
            self._consumer.set_result(None)
