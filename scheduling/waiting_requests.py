"""Requests that no instance has now, and what becomes of them.

queued      no instance has credit: in the order of `RequestQueue`, until it has waited for too long
recovering  the request has lost its instances, and waits for another one, or for the end of its pause
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
"""Requests that wait no longer, in vain: the caller ends each with its error."""


class WaitingRequests:
    """Owned by the routing machine. Whoever waits begins an attempt as soon as an instance takes it."""

    __slots__ = ("_attempts", "_has_news", "_recovering", "_selector", "_settings", "_wake_up", "admission", "queue")

    def __init__(
        self, settings: RoutingSettings, selector: InstanceSelector, attempts: Attempts, wake_up: WakeUp
    ) -> None:
        self.queue = RequestQueue(settings.queue_order)
        self.admission = Admission(self.queue, selector, max_queue=settings.max_queue, max_wait_s=settings.max_wait_s)
        self._settings = settings
        self._selector = selector
        self._attempts = attempts
        self._wake_up = wake_up
        self._recovering: KeyedHeap[RoutedRequest] = KeyedHeap()  # when it is looked at again
        self._has_news = False  # an instance may have become usable

    @property
    def next_s(self) -> float:
        """When `advance` has something to do; inf: never."""
        first = self._recovering.peek()
        return min(math.inf if first is None else first[0], self.queue.next_end_s)

    def instances_changed(self) -> None:
        """Those that recover are tried again when the machine settles."""
        self._has_news = True

    # --- coming in ---------------------------------------------------------------------------------------------------

    def add(self, request: RoutedRequest, now_s: float) -> None:
        """A newcomer: it begins at once where nobody waits and an instance has credit."""
        place = None if len(self.queue) else self._selector.choose_first(request, now_s)
        if place is None:
            self._wait_for_credit(request, now_s)
        else:
            self.queue.ledger.dispatched(request.client, request.num_tokens)
            self._begin(request, place, now_s)

    def take_back(self, request: RoutedRequest, error: TandemError, now_s: float) -> TandemError | None:
        """Its attempt has failed. Returns what it ends with, if it is not tried again."""
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
        """After a failure."""
        is_resumed = self._settings.resume or not request.num_output_tokens
        return is_resumed and request.num_attempts < self._settings.max_attempts

    # --- going out ---------------------------------------------------------------------------------------------------

    def settle(self, now_s: float) -> Ended:
        """Try those again that recover, if an instance may have come, and then those that wait for credit."""
        ended: Ended = []
        if self._has_news:
            self._has_news = False
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
            else:  # the instances that it waited for are gone
                self.queue.discard(first, now_s)
                first.error = first.error or UnavailableError("all workers are gone")
                first.give_up_s = now_s + self._settings.replacement_wait_s
                if (error := self._wait_for_instance(first, now_s)) is not None:
                    ended.append((first, error))
        return ended

    def advance(self, now_s: float) -> Ended:
        """Time has passed: some have waited for too long, and some pauses are over."""
        ended: Ended = [
            (request, self.admission.waited_in_vain(request, now_s)) for request in self.queue.pop_impatient(now_s)
        ]
        while (first := self._recovering.peek()) is not None and first[0] <= now_s:
            if (error := self._recover(first[1], now_s)) is not None:
                ended.append((first[1], error))
        return ended

    def discard(self, request: RoutedRequest, now_s: float) -> None:
        """It waits no longer; one that does not wait is ignored."""
        self.queue.discard(request, now_s)
        self._recovering.discard(request)

    # --- parts -------------------------------------------------------------------------------------------------------

    def _begin(self, request: RoutedRequest, place: Place, now_s: float) -> None:
        if request.has_due_time and now_s > request.due_s and not request.num_output_tokens:
            request.demoted_because = "its TTFT target had passed while it waited"
        self._attempts.begin(request, place, now_s)

    def _recover(self, request: RoutedRequest, now_s: float) -> TandemError | None:
        """Begin another attempt: at once on an instance that has not failed the request, else after a pause. Returns
        what the request ends with instead."""
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
            return request.error  # all queues are full: the client should know, not wait here too
        else:
            return self._wait_for_instance(request, now_s)
        return None

    def _wait_for_instance(self, request: RoutedRequest, now_s: float) -> TandemError | None:
        """As `_recover`: it has waited for as long as it may."""
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
        """One that has tokens already waits until its deadline: its client was promised the rest."""
        until_s = math.inf if request.num_output_tokens else self.admission.last_start_s(request, now_s)
        self.queue.push(request, until_s, now_s)
        self._wake_up.at(until_s)


def _final(request: RoutedRequest, error: TandemError) -> TandemError:
    """What the client is told of the last of several failures."""
    is_early = isinstance(error, OverloadedError | ContextLengthError) and not request.num_output_tokens
    return error if is_early or isinstance(error, UnavailableError) else UnavailableError(error.message)
