"""One attempt at a request: a prefill worker, then a decode worker, over one epoch.

    SubmitPrefill -> PrefillStarted -> PrefillFinished ------------------+-> tokens -> finished
                          | OpenDecode (late binding)                    |
                          +-> DecodeReserved -> TransferCommitted -> DecodeFrame ...

The two workers' streams are not ordered with each other: decode's tokens may overtake the first token, and are then
held until it is here. Whatever ends the attempt takes it off both workers; events that were on their way are dropped,
since its handles are no longer open.
"""

from collections.abc import Iterator
from typing import Protocol

from tandem.core.errors import InternalError, TandemError, TransferError, UnavailableError
from tandem.core.request import FinishReason, GenerationRequest, SampledToken
from tandem.core.session import (
    DecodeReserved,
    DecodeTokens,
    KvSource,
    OpenDecode,
    PrefillFinished,
    PrefillStarted,
    SubmitPrefill,
    TransferCommitted,
)
from tandem.router.choices import Chosen
from tandem.router.instances import Instance, ProgressEvent
from tandem.router.records import AttemptRecord
from tandem.router.stamps import Stamps


class AttemptOwner(Protocol):
    """The request that an attempt works for."""

    stamps: Stamps

    def now_s(self) -> float: ...

    def choose_decode(self, request: GenerationRequest, prefill: Instance) -> Chosen:
        """Raises UnavailableError or ContextLengthError."""
        ...

    def first_token(self, event: PrefillFinished) -> None: ...

    def new_tokens(self, tokens: tuple[SampledToken, ...], finish_reason: FinishReason | None) -> None: ...

    def attempt_failed(self, error: TandemError, blamed: frozenset[str]) -> None:
        """`blamed` are the instances that a further attempt should rather not use."""
        ...


class Attempt:
    """Listens to its two instances from `start` until it has finished, failed or been cancelled."""

    def __init__(
        self, owner: AttemptOwner, request: GenerationRequest, prefill: Chosen, handles: Iterator[int]
    ) -> None:
        self._owner = owner
        self._request = request
        self._prefill = prefill.instance
        self._decode: Instance | None = None
        self._handle = next(handles)
        self._has_first_token = False
        self._has_transfer = False
        self._early: list[DecodeTokens] = []
        self.record = AttemptRecord(
            epoch=request.epoch, prefill_id=prefill.instance.instance_id, prefill_choice=prefill.choice
        )

    def start(self) -> None:
        try:
            self._prefill.submit(SubmitPrefill(self._handle, self._request), self)
        except UnavailableError as error:
            self.on_failed(self._prefill, error)

    def cancel(self) -> None:
        """Take it off both workers, in whatever phase. May be called again."""
        self._prefill.cancel(self._handle)
        if self._decode is not None:
            self._decode.cancel(self._handle)

    def on_progress(self, event: ProgressEvent) -> None:
        owner = self._owner
        if isinstance(event, PrefillStarted):
            owner.stamps.prefill_started(owner.now_s())
            self._prefill.computed(self._handle, event.num_cached_tokens)
            if self._decode is None and self._needs_decode():
                self._open_decode()
        elif isinstance(event, PrefillFinished):
            self._on_first_token(event)
        elif isinstance(event, DecodeReserved):
            owner.stamps.decode_reserved(owner.now_s())
        else:
            self._on_transfer(event)

    def on_tokens(self, item: DecodeTokens) -> None:
        if not self._has_first_token:
            self._early.append(item)
            return
        if item.finish_reason is not None:
            assert self._decode is not None, "decode tokens come from an instance that was opened"
            self._decode.release(self._handle)
            self._prefill.cancel(self._handle)
        if item.queue_s is not None:
            self._owner.stamps.decode_admitted(item.queue_s, self._owner.now_s())
        self._owner.new_tokens(item.tokens, item.finish_reason)

    def on_failed(self, instance: Instance, error: TandemError) -> None:
        self.cancel()
        self.record.failure = error.code
        blamed = {instance.instance_id}
        if isinstance(error, TransferError) and self._decode is not None:
            blamed = {self._prefill.instance_id, self._decode.instance_id}  # either end may be the reason
        self._owner.attempt_failed(error, frozenset(blamed))

    def _needs_decode(self) -> bool:
        return self._request.sampling.max_tokens - self._request.num_output_tokens > 1

    def _open_decode(self) -> None:
        try:
            chosen = self._owner.choose_decode(self._request, self._prefill)
        except TandemError as error:
            self.cancel()
            self.record.failure = error.code
            self._owner.attempt_failed(error, frozenset())
            return
        source = KvSource(self._prefill.instance_id, self._prefill.status.address)
        self.record.decode_id, self.record.decode_choice = chosen.instance.instance_id, chosen.choice
        try:
            chosen.instance.submit(OpenDecode(self._handle, self._request, source), self)
            self._decode = chosen.instance
        except UnavailableError as error:
            self.on_failed(chosen.instance, error)

    def _on_first_token(self, event: PrefillFinished) -> None:
        if self._has_first_token:
            self.on_failed(self._prefill, InternalError("a prefill worker answered twice"))
            return
        self._has_first_token = True
        self._prefill.computed(self._handle, len(self._request.token_ids))
        if event.finish_reason is not None:
            self._prefill.release(self._handle)
            self.cancel()
        elif self._has_transfer:
            self._prefill.release(self._handle)
        self._owner.first_token(event)
        self._owner.new_tokens((event.token,), event.finish_reason)
        if event.finish_reason is None and self._decode is None:
            self._open_decode()
        early, self._early = self._early, []
        for item in early:
            self.on_tokens(item)

    def _on_transfer(self, event: TransferCommitted) -> None:
        self._has_transfer = True
        self._owner.stamps.transfer_committed(event, self._owner.now_s())
        self.record.transport, self.record.transfer_s = event.transport, event.transfer_s
        self.record.transfer_bytes = event.transfer_bytes
        if self._has_first_token:
            self._prefill.release(self._handle)
