"""Accepts requests in token ids and runs each on a pair of workers: the token side of the router."""

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tandem.core.clock import Clock
from tandem.core.errors import (
    DeadlineError,
    DuplicateRequestError,
    OverloadedError,
    TandemError,
    UnavailableError,
)
from tandem.core.request import GenerationRequest
from tandem.router.choices import Chosen, LoadChooser
from tandem.router.fleet import Fleet
from tandem.router.instances import Instance
from tandem.router.records import ArrivalObserver, RequestObserver, RequestRecord
from tandem.router.running import RetryPolicy, RunningRequest


@dataclass(frozen=True, slots=True)
class DispatchLimits:
    """`max_queue` counts all requests in the router; `request_timeout_s` is the deadline of one that names none."""

    max_queue: int = 1024
    request_timeout_s: float = 600.0


class Dispatcher:
    """Implements `core.generation.TokenGenerator`. Used on one event loop only."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        chooser: LoadChooser,
        clock: Clock,
        limits: DispatchLimits,
        retry: RetryPolicy,
        observers: Sequence[RequestObserver] = (),
        arrivals: ArrivalObserver | None = None,
    ) -> None:
        self.clock = clock
        self.retry = retry
        self.handles: Iterator[int] = itertools.count(1)
        self._fleet = fleet
        self._chooser = chooser
        self._limits = limits
        self._observers = tuple(observers)
        self._arrivals = arrivals
        self._running: dict[str, RunningRequest] = {}
        self._is_draining = False
        self._all_ended = asyncio.Event()
        self._all_ended.set()

    # --- TokenGenerator ----------------------------------------------------------------------------------------------

    @property
    def max_model_len(self) -> int:
        if self._is_draining:
            raise UnavailableError("the router is shutting down")
        return self._fleet.pair_capacity_tokens()

    def start(self, request: GenerationRequest, received_s: float) -> RunningRequest:
        """Besides what `TokenGenerator` names, raises DeadlineError if the deadline has passed already."""
        if self._arrivals is not None:
            self._arrivals.arrived(self.clock.now_s())
        try:
            self._admit(request)
            if request.deadline_s == float("inf"):
                request = replace(request, deadline_s=received_s + self._limits.request_timeout_s)
            if request.deadline_s <= self.clock.now_s():
                raise DeadlineError("the request's deadline has passed")
            prefill = self.choose_prefill(request, frozenset())
        except TandemError as error:
            for observer in self._observers:
                observer.refused(error)
            raise
        running = RunningRequest(self, request, received_s)
        self._running[request.request_id] = running
        self._all_ended.clear()
        running.start(prefill)
        return running

    def _admit(self, request: GenerationRequest) -> None:
        if self._is_draining:
            raise UnavailableError("the router is shutting down")
        if request.request_id in self._running:
            raise DuplicateRequestError(f"a request with the id '{request.request_id}' is running")
        if len(self._running) >= self._limits.max_queue:
            raise OverloadedError(f"the router already holds {self._limits.max_queue} requests; try again later")
        self._fleet.check_length(len(request.token_ids))

    # --- Desk --------------------------------------------------------------------------------------------------------

    def choose_prefill(self, request: GenerationRequest, avoid: frozenset[str]) -> Chosen:
        return self._chooser.choose_prefill(request, avoid)

    def choose_decode(self, request: GenerationRequest, prefill: Instance, avoid: frozenset[str]) -> Chosen:
        return self._chooser.choose_decode(request, prefill, avoid)

    def ended(self, request: RunningRequest) -> None:
        del self._running[request.request.request_id]
        if not self._running:
            self._all_ended.set()

    def closed(self, record: RequestRecord) -> None:
        for observer in self._observers:
            observer.finished(record)

    # --- control -----------------------------------------------------------------------------------------------------

    @property
    def is_serving(self) -> bool:
        """Whether a request could be served now."""
        return not self._is_draining and self._fleet.has_pair()

    @property
    def running_requests(self) -> int:
        """Requests whose first token is here."""
        return sum(running.has_tokens for running in self._running.values())

    @property
    def queued_requests(self) -> int:
        """Requests without a first token yet."""
        return len(self._running) - self.running_requests

    def refuse_new(self) -> None:
        """From now on `start` raises UnavailableError; what runs goes on."""
        self._is_draining = True

    async def wait_until_idle(self) -> None:
        """Returns when no request runs on any worker."""
        await self._all_ended.wait()

    def abort_all(self) -> None:
        """End what still runs with UnavailableError."""
        for running in list(self._running.values()):
            running.abort(UnavailableError("the router is shutting down"))
