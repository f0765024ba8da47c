"""Requests without an attempt in flight: they wait for credit, or for another instance after a failure.

queued      No instance has credit. The request waits in the order of `RequestQueue`, for a limited time.
recovering  The request has lost its instances. It waits for a usable one, or for the end of its retry pause.
"""

import math

from tandem.core.errors import (
    ContextLengthError,
    IncompatiblePeerError,
    OverloadedError,
    TandemError,
    TransferError,
    UnavailableError,
)
from tandem.scheduling.admission import Admission
from tandem.scheduling.attempts import Attempts
from tandem.scheduling.instance_selector import InstanceSelector, Place
from tandem.scheduling.keyed_heap import KeyedHeap
from tandem.scheduling.request_queue import RequestQueue
from tandem.scheduling.routed_request import RoutedRequest
from tandem.scheduling.routing_driver import WakeUp
from tandem.scheduling.routing_settings import RoutingSettings

_RETRIED = (UnavailableError, TransferError, OverloadedError, IncompatiblePeerError)

Ended = list[tuple[RoutedRequest, TandemError]]
"""Requests that have waited for too long, with the errors with which the caller ends them."""


class WaitingRequests:
    """Owned by the routing machine. Begins an attempt of each waiting request as soon as an instance takes it."""

    __slots__ = (
        "_attempts",
        "_instances_changed",
        "_recovering",
        "_selector",
        "_settings",
        "_wake_up",
        "admission",
        "queue",
    )

    def __init__(
        self, settings: RoutingSettings, selector: InstanceSelector, attempts: Attempts, wake_up: WakeUp
    ) -> None:
        self.queue = RequestQueue(settings.queue_order)
        self.admission = Admission(self.queue, selector, max_queue=settings.max_queue, max_wait_s=settings.max_wait_s)
        self._settings = settings
        self._selector = selector
        self._attempts = attempts
        self._wake_up = wake_up
        self._recovering: KeyedHeap[RoutedRequest] = KeyedHeap()  # by the time of the next try
        self._instances_changed = False  # since the last `settle`

    @property
    def next_s(self) -> float:
        """When `advance` has to be called next; inf: never."""
        first = self._recovering.peek()
        return min(math.inf if first is None else first[0], self.queue.next_end_s)

    def instances_changed(self) -> None:
        """An instance may have become usable: `settle` tries the recovering requests again."""
        self._instances_changed = True

    # --- coming in ---------------------------------------------------------------------------------------------------

    def add(self, request: RoutedRequest, now_s: float) -> None:
        """A new request. It begins at once if the queue is empty and an instance has credit."""
        place = None if len(self.queue) else self._selector.choose_first(request, now_s)
        if place is None:
            self._wait_for_credit(request, now_s)
        else:
            self.queue.ledger.dispatched(request.client, request.num_tokens)
            self._begin(request, place, now_s)

    def take_back(self, request: RoutedRequest, error: TandemError, now_s: float) -> TandemError | None:
        """The request's attempt has failed. Returns the error with which the request ends, None if it is retried."""
        settings = self._settings
        request.error = error
        if not isinstance(error, _RETRIED):
            return error
        if not self.may_continue(request):
            return _final(request, error)
        request.retry_s = now_s + settings.retry_pause_s
        request.give_up_s = now_s + settings.replacement_wait_s
        return self._recover(request, now_s)

    def may_continue(self, request: RoutedRequest) -> bool:
        """Whether the request may have another attempt after a failure."""
        is_resumed = self._settings.resume or not request.num_output_tokens
        return is_resumed and request.num_attempts < self._settings.max_attempts

    # --- going out ---------------------------------------------------------------------------------------------------

    def settle(self, now_s: float) -> Ended:
        """Begin attempts: of recovering requests, if instances have changed, and then of queued ones."""
        ended: Ended = []
        if self._instances_changed:
            self._instances_changed = False
            for request in sorted(self._recovering, key=lambda each: each.number):
                if request in self._recovering and (error := self._recover(request, now_s)) is not None:
                    ended.append((request, error))
        while (first := self.queue.first(now_s)) is not None:
            place = self._selector.choose_first(first, now_s)
            if place is None and self._selector.waits_for_credit(first):
                break
            if place is not None:
                self.queue.dispatch(first, now_s)
                self._begin(first, place, now_s)
            else:  # no usable instance is left
                self.queue.discard(first, now_s)
                first.error = first.error or UnavailableError("all workers are gone")
                first.give_up_s = now_s + self._settings.replacement_wait_s
                if (error := self._wait_for_instance(first, now_s)) is not None:
                    ended.append((first, error))
        return ended

    def advance(self, now_s: float) -> Ended:
        """End requests that have waited for too long, and retry those whose pause is over."""
        ended: Ended = [
            (request, self.admission.waited_in_vain(request, now_s)) for request in self.queue.pop_impatient(now_s)
        ]
        while (first := self._recovering.peek()) is not None and first[0] <= now_s:
            if (error := self._recover(first[1], now_s)) is not None:
                ended.append((first[1], error))
        return ended

    def discard(self, request: RoutedRequest, now_s: float) -> None:
        """Remove the request; no effect if it does not wait."""
        self.queue.discard(request, now_s)
        self._recovering.discard(request)

    # --- parts -------------------------------------------------------------------------------------------------------

    def _begin(self, request: RoutedRequest, place: Place, now_s: float) -> None:
        if request.has_due_time and now_s > request.due_s and not request.num_output_tokens:
            request.demoted_because = "its TTFT target had passed while it waited"
        self._attempts.begin(request, place, now_s)

    def _recover(self, request: RoutedRequest, now_s: float) -> TandemError | None:
        """Begin another attempt: at once on an instance that has not failed the request, else after a pause. Returns
        the error with which the request ends instead, or None."""
        self._recovering.discard(request)
        place = self._selector.choose_first(request, now_s)
        if place is None:
            if not self._selector.waits_for_credit(request):
                return self._wait_for_instance(request, now_s)
            self._wait_for_credit(request, now_s)
        elif now_s >= request.retry_s or place.instance.instance_id not in request.avoid:
            self.queue.ledger.dispatched(request.client, request.num_tokens)
            self._begin(request, place, now_s)
        elif isinstance(request.error, OverloadedError) and not request.num_output_tokens:
            return request.error  # the queues of all instances are full, so the client should try later
        else:
            return self._wait_for_instance(request, now_s)
        return None

    def _wait_for_instance(self, request: RoutedRequest, now_s: float) -> TandemError | None:
        """Try again later. Returns an error if the request has waited for `replacement_wait_s` already."""
        if now_s >= request.give_up_s:
            error = request.error
            try:
                self._selector.length.check(request.num_tokens)  # says what is missing
            except TandemError as missing:
                error = missing
            assert error is not None, "a request waits for an instance because it lost one"
            return _final(request, error)
        time_s = request.retry_s if now_s < request.retry_s else request.give_up_s
        self._recovering.push(request, time_s)
        self._wake_up.at(time_s)
        return None

    def _wait_for_credit(self, request: RoutedRequest, now_s: float) -> None:
        """A request that has sent tokens to its client waits until its deadline, instead of being refused halfway."""
        until_s = math.inf if request.num_output_tokens else self.admission.last_start_s(request, now_s)
        self.queue.push(request, until_s, now_s)
        self._wake_up.at(until_s)


def _final(request: RoutedRequest, error: TandemError) -> TandemError:
    """The error that the client gets for the last of several failures."""
    is_early = isinstance(error, OverloadedError | ContextLengthError) and not request.num_output_tokens
    return error if is_early or isinstance(error, UnavailableError) else UnavailableError(error.message)
