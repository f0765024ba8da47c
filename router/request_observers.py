"""Observers of ended requests: metrics, logs, traces."""

import logging
from collections.abc import Callable, Sequence

from tandem.core.errors import OverloadedError, TandemError
from tandem.core.request import GenerationRequest
from tandem.core.timeline import Stage, Timeline
from tandem.router.records import RequestObserver, RequestRecord

_LOG = logging.getLogger(__name__)


class RequestObservers:
    """Calls all observers. An observer's error is logged, so that it does not fail the request."""

    def __init__(self, observers: Sequence[RequestObserver]) -> None:
        self._observers = list(observers)

    def add(self, observer: RequestObserver) -> None:
        """Add an observer of the requests that end from now on."""
        self._observers.append(observer)

    def finished(self, record: RequestRecord) -> None:
        self._tell(lambda observer: observer.finished(record))

    def refused(
        self, error: TandemError, request: GenerationRequest, *, received_s: float, now_s: float, client: str
    ) -> None:
        """The request was refused, and never ran."""
        record = RequestRecord(
            request_id=request.request_id,
            outcome=error.code,
            message=error.message,
            timeline=Timeline({Stage.RECEIVED: received_s, Stage.FINISHED: now_s}, request.num_prompt_tokens),
            attempts=(),
            slo=request.slo,
            refused_because=error.reason if isinstance(error, OverloadedError) else None,
            tenant=client,
            trace=request.trace,
            sampling=None if request.trace is None else request.sampling,
        )
        self._tell(lambda observer: observer.refused(error, record))

    def _tell(self, tell: Callable[[RequestObserver], None]) -> None:
        for observer in self._observers:
            try:
                tell(observer)
            except Exception:  # noqa: BLE001 - whatever a counter raises
                _LOG.exception("a request could not be recorded")
