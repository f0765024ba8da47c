"""The router's decisions as one state machine: where a request runs, how it is retried, and when it ends.

    submit --+--> queued: no instance has credit --+
             |                                     v
             +---------------------------------> attempt -----> finished
                                                   |   ^
                            the attempt has failed |   | another instance is usable, or the pause is over
                                                   v   |
                                               recovering ----> error: too many attempts, no usable instance in time,
                                                                or an invalid request
    (in every state: deadline, or cancelled by the client)

    an attempt on a pair                                      an attempt on one instance
    prefill started    -> select the decode instance          prefill started
    prefill finished   -> first token                         prefill finished -> first token
    transfer failed    -> perhaps another decode instance     tokens ... finished
    transfer committed -> prefill holds nothing any more
    tokens ... finished

The machine knows counts and ids, never tokens or text. It has no clock, no I/O and no randomness: time comes with each
event, and decisions go to a `RoutingDriver`. The live router and the simulator are the two drivers, so both decide
alike. The methods for an attempt's events return False for an attempt that has ended: the driver drops the event.
"""

import math
from collections.abc import Hashable, Mapping

from tandem.core.errors import DeadlineError, InternalError, StaleEpochError, TandemError, UnavailableError
from tandem.core.session import InstanceStatus
from tandem.scheduling.attempts import Attempts
from tandem.scheduling.goodput_selector import GoodputSelector
from tandem.scheduling.instance_selector import InstanceSelector
from tandem.scheduling.keyed_heap import KeyedHeap
from tandem.scheduling.known_instance import KnownInstance
from tandem.scheduling.predictor import Residuals
from tandem.scheduling.prefix_tracker import PrefixTracker
from tandem.scheduling.routed_request import Attempt, RoutedRequest
from tandem.scheduling.routing_driver import RoutingDriver, WakeUp
from tandem.scheduling.routing_settings import RoutingPolicy, RoutingSettings
from tandem.scheduling.waiting_requests import Ended, WaitingRequests

_SELECTORS: Mapping[RoutingPolicy, type[InstanceSelector]] = {"balanced": InstanceSelector, "goodput": GoodputSelector}


class RoutingMachine:
    """Owns all requests until they end. One thread makes all calls."""

    def __init__(
        self,
        driver: RoutingDriver,
        settings: RoutingSettings,
        *,
        explain: bool = True,
        selector_type: type[InstanceSelector] | None = None,
        tracker_type: type[PrefixTracker] = PrefixTracker,
    ) -> None:
        """`explain`: the driver gets the comparison behind each decision, which costs time and changes no decision.
        `selector_type`: a policy that the settings do not know. `tracker_type`: for block names that are not hashes.
        """
        self._driver = driver
        selector_type = selector_type or _SELECTORS[settings.policy]
        self._selector = selector_type(settings, explain=explain, tracker_type=tracker_type)
        self._requests: dict[Hashable, RoutedRequest] = {}
        self._deadlines: KeyedHeap[RoutedRequest] = KeyedHeap()
        self._wake_up = WakeUp(driver)
        self._attempts = Attempts(driver, self._selector, self._wake_up)
        self._waiting = WaitingRequests(settings, self._selector, self._attempts, self._wake_up)
        self._queue = self._waiting.queue
        self._ledger = self._queue.ledger
        self._num_submitted = 0

    # --- instances ---------------------------------------------------------------------------------------------------

    @property
    def instances(self) -> Mapping[str, KnownInstance]:
        return self._selector.instances

    def instance_reported(self, status: InstanceStatus, now_s: float) -> None:
        """The first report of an instance registers it. Later ones update it; the role may have changed."""
        links_changed = self._selector.failures.set_unreachable(status.instance_id, status.unreachable_peers)
        known = self._selector.instances.get(status.instance_id)
        if known is None:
            self._selector.update(KnownInstance(status))
            return
        before = known.offer
        if known.role is not status.role:
            self._selector.leave_role(known)
        known.report(status)
        self._selector.update(known)
        if links_changed or known.offer != before:
            self._offers_changed()
            self._settle(now_s)

    def instance_connected(self, instance_id: str, now_s: float) -> None:
        """Attempts can be sent to the instance."""
        instance = self._selector.instances[instance_id]
        instance.is_connected = True
        self._selector.put(instance)
        self._offers_changed()
        self._settle(now_s)

    def instance_lost(self, instance_id: str, now_s: float) -> None:
        """The session has ended: all attempts at the instance fail. The instance may be connected again."""
        instance = self._selector.instances[instance_id]
        if not instance.is_connected:
            return
        instance.is_connected = False
        self._offers_changed()
        attempts = instance.attempts()
        for attempt in attempts:
            instance.release(attempt.handle)
            self._selector.released(attempt, instance_id, now_s)
        self._selector.put(instance)
        if attempts:
            self._selector.failures.add(instance_id, now_s)
        error = UnavailableError(f"the {instance.role.value} worker is gone")
        for attempt in attempts:
            if attempt.request.attempt is attempt:
                if attempt.decode is instance and self._hand_over_again(attempt, error, now_s):
                    continue
                # Sent when the instance was lost already, or its KV was to be read by another reader, and its host was
                # lost as a whole: it does not count.
                if not attempt.has_started or (attempt.prefill is instance and attempt.reader_error is not None):
                    attempt.request.num_attempts -= 1
                self._fail(attempt, error, {instance_id}, now_s)
        self._settle(now_s)

    def instance_removed(self, instance_id: str, now_s: float) -> None:
        """The instance is gone for good: its load, its failures and its cached prefixes are forgotten."""
        self.instance_lost(instance_id, now_s)
        self._selector.remove(instance_id)

    # --- requests ----------------------------------------------------------------------------------------------------

    def capacity_tokens(self) -> int:
        """Longest prompt plus answer that a usable instance or pair can hold. Raises UnavailableError without one."""
        return self._selector.length.require()

    @property
    def num_held(self) -> int:
        """Requests that wait for an instance with credit."""
        return len(self._queue)

    def expected_wait_s(self, now_s: float) -> float:
        """How long a new request would wait for credit, at the rate of the last seconds."""
        return self._queue.expected_wait_s(now_s)

    def prediction_errors(self) -> Mapping[str, Residuals]:
        """Errors of the predicted times, by kind of time. Empty for a policy that predicts none."""
        return self._selector.prediction_errors()

    def submit(self, request: RoutedRequest, now_s: float) -> None:
        """Accept a new request, and begin its first attempt if an instance has credit.

        Raises DeadlineError, OverloadedError, UnavailableError or ContextLengthError for a request that cannot be
        accepted.
        """
        assert request.key not in self._requests, "two requests have one key"
        self._num_submitted += 1
        request.number = self._num_submitted
        self._waiting.admission.check(request, now_s, num_others=len(self._requests))
        self._requests[request.key] = request
        self._ledger.open(request.client)
        if request.deadline_s < math.inf:
            self._deadlines.push(request, request.deadline_s)
            self._wake_up.at(request.deadline_s)
        self._waiting.add(request, now_s)

    def cancel(self, request: RoutedRequest, now_s: float) -> None:
        """The client has cancelled the request. `RoutingDriver.end` is not called. No effect on an ended request."""
        if self._requests.get(request.key) is request:
            self._forget(request, now_s)
            self._settle(now_s)

    def advance(self, now_s: float) -> None:
        """End requests whose deadline has passed, retry those whose pause is over, and renew leases."""
        self._wake_up.has_come()
        for request in self._deadlines.pop_until(now_s):
            self._end_all([(request, DeadlineError("the request's deadline has passed"))], now_s)
        self._end_all(self._waiting.advance(now_s), now_s)
        self._attempts.renew_leases(now_s)
        self._settle(now_s)
        if (first := self._deadlines.peek()) is not None:
            self._wake_up.at(first[0])
        self._wake_up.at(self._waiting.next_s)
        self._wake_up.at(self._attempts.next_renewal_s)

    # --- attempts ----------------------------------------------------------------------------------------------------

    def find(self, instance_id: str, handle: int) -> Attempt | None:
        """The attempt with that handle at that instance, None if it has ended there."""
        instance = self._selector.instances.get(instance_id)
        return None if instance is None else instance.find(handle)

    def prefill_started(self, attempt: Attempt, num_cached_tokens: int, now_s: float) -> bool:
        """The first chunk of the prompt is in a step. The decode instance is selected now (late binding), so that
        queued prompts hold no decode memory. A preempted prompt starts again; only the first start counts."""
        instance = attempt.prefill
        if instance is None:
            return False
        if attempt.has_started:
            return True
        attempt.has_started = True
        self._ledger.found_cached(attempt.request.client, num_cached_tokens)
        self._attempts.record_progress(attempt, instance, num_cached_tokens)
        if attempt.hand_over and attempt.decode is None and attempt.growth_tokens > 1:
            self._hand_over(attempt, instance, now_s)
        self._settle(now_s)
        return True

    def prefill_finished(self, attempt: Attempt, now_s: float, *, is_last: bool) -> bool:
        """The first token of the attempt has arrived. `is_last`: it is also the last one."""
        instance = attempt.prefill
        if instance is None:
            return False
        if attempt.has_first_token:
            error = InternalError("a prefill worker sent two first tokens")
            self._fail(attempt, error, {instance.instance_id}, now_s)
            self._settle(now_s)
            return False
        attempt.has_first_token = True
        self._selector.first_token(attempt, now_s)
        self._queue.first_token_time.observe(attempt.num_tokens, now_s - attempt.begun_s)
        self._ledger.generated(attempt.request.client, 1)
        attempt.request.num_output_tokens += 1
        self._attempts.record_progress(attempt, instance, attempt.num_tokens)
        if is_last:
            self._attempts.release_prefill(attempt, now_s)
            self._end(attempt.request, None, now_s)
        elif attempt.has_transfer:
            self._attempts.release_prefill(attempt, now_s)
        elif attempt.hand_over:
            if attempt.decode is None:
                self._hand_over(attempt, instance, now_s)
            self._attempts.await_kv(attempt, now_s)
        self._settle(now_s)
        return True

    def transfer_committed(self, attempt: Attempt, now_s: float) -> bool:
        """The decode instance owns the KV, and the prefill instance has freed it."""
        if attempt.decode is None or attempt.has_transfer:
            return False
        attempt.has_transfer = True
        attempt.decode.kv_arrived(attempt.handle)
        self._selector.transferred(attempt, now_s)
        self._selector.put(attempt.decode)
        if attempt.has_first_token and attempt.prefill is not None:
            self._attempts.release_prefill(attempt, now_s)
        self._settle(now_s)
        return True

    def tokens_generated(self, attempt: Attempt, count: int, now_s: float) -> bool:
        """`count` tokens after the attempt's first one have arrived."""
        if attempt.generating is None:
            return False
        request = attempt.request
        request.num_output_tokens += count
        self._ledger.generated(request.client, count)
        if request.num_output_tokens > request.max_tokens:
            self._end(request, InternalError("a worker sent more tokens than were asked for"), now_s)
            self._settle(now_s)
            return False
        return True

    def attempt_finished(self, attempt: Attempt, now_s: float) -> bool:
        """The last token of the attempt has arrived."""
        instance = attempt.generating
        if instance is None:
            return False
        self._selector.finished(attempt, now_s)
        if instance is attempt.prefill:
            self._attempts.release_prefill(attempt, now_s)
        else:
            attempt.decode = None
            self._attempts.release(attempt, instance, now_s)
        self._end(attempt.request, None, now_s)
        self._settle(now_s)
        return True

    def attempt_failed(self, attempt: Attempt, instance_id: str, error: TandemError, now_s: float) -> bool:
        """The instance has ended the attempt with an error, and has freed its blocks."""
        instance = self._selector.instances.get(instance_id)
        if instance is None or instance.find(attempt.handle) is None:
            return False
        # A decode instance that was lost meanwhile had acknowledged the KV already: no instance is to blame.
        was_acknowledged = attempt.reader_error is not None and isinstance(error, StaleEpochError)
        blamed = set() if was_acknowledged else self._attempts.blame(attempt, instance, error, now_s)
        self._attempts.release(attempt, instance, now_s)
        may_hand_over = instance is attempt.decode and self._attempts.may_hand_over_again(attempt, error)
        if not (may_hand_over and self._hand_over_again(attempt, error, now_s)):
            if was_acknowledged:
                attempt.request.num_attempts -= 1
            self._fail(attempt, error, blamed, now_s)
        self._settle(now_s)
        return True

    # --- parts -------------------------------------------------------------------------------------------------------

    def _hand_over(self, attempt: Attempt, prefill: KnownInstance, now_s: float) -> None:
        if not self._attempts.hand_over(attempt, prefill, now_s):
            error = UnavailableError("no decode worker is ready that can read the prefill worker's KV")
            self._fail(attempt, error, set(), now_s)

    def _hand_over_again(self, attempt: Attempt, error: TandemError, now_s: float) -> bool:
        """As `Attempts.hand_over_again`, if the request may have another attempt."""
        may_continue = self._waiting.may_continue(attempt.request)
        return may_continue and self._attempts.hand_over_again(attempt, error, now_s)

    def _fail(self, attempt: Attempt, error: TandemError, blamed: set[str], now_s: float) -> None:
        """End the attempt, then retry its request or end it. Further attempts avoid the instances `blamed`."""
        attempt.error = error
        self._attempts.withdraw(attempt, now_s)
        request = attempt.request
        request.attempt = None
        request.avoid |= blamed
        if (last := self._waiting.take_back(request, error, now_s)) is not None:
            self._end(request, last, now_s)

    def _settle(self, now_s: float) -> None:
        """Credit or instances may have become available: begin attempts of waiting requests."""
        self._end_all(self._waiting.settle(now_s), now_s)

    def _end(self, request: RoutedRequest, error: TandemError | None, now_s: float) -> None:
        if error is None:
            self._selector.answer_lengths.observe(request.num_output_tokens)
        self._forget(request, now_s)
        self._driver.end(request, error)

    def _end_all(self, ended: Ended, now_s: float) -> None:
        """Skips requests that have ended meanwhile: at the end of one request a driver may cancel others."""
        for request, error in ended:
            if self._requests.get(request.key) is request:
                self._end(request, error, now_s)

    def _forget(self, request: RoutedRequest, now_s: float) -> None:
        """Remove all state of the request, here and at its instances."""
        del self._requests[request.key]
        self._ledger.close(request.client)
        if not self._requests:
            self._wake_up.cancel()
        if request.deadline_s < math.inf:
            self._deadlines.discard(request)
        if request.attempt is not None:
            self._attempts.withdraw(request.attempt, now_s)
            request.attempt = None
        else:
            self._waiting.discard(request, now_s)

    def _offers_changed(self) -> None:
        self._selector.length.changed()
        self._waiting.instances_changed()
