"""Attempts in flight: begins them at instances, accounts for their load there, renews leases, and withdraws them."""

import math

from tandem.core.errors import IncompatiblePeerError, StaleEpochError, TandemError, TransferError, UnavailableError
from tandem.scheduling.instance_selector import InstanceSelector, Place
from tandem.scheduling.keyed_heap import KeyedHeap
from tandem.scheduling.known_instance import KnownInstance
from tandem.scheduling.routed_request import Attempt, RoutedRequest
from tandem.scheduling.routing_driver import RoutingDriver, WakeUp

LEASE_SHARE = 1 / 3  # a lease is renewed after this share of its time, so that two renewals may come late


class Attempts:
    """Keeps the load that the selector knows of each instance up to date, and renews leases on KV that waits."""

    __slots__ = ("_driver", "_num_begun", "_renewals", "_selector", "_wake_up")

    def __init__(self, driver: RoutingDriver, selector: InstanceSelector, wake_up: WakeUp) -> None:
        self._driver = driver
        self._selector = selector
        self._wake_up = wake_up
        self._renewals: KeyedHeap[Attempt] = KeyedHeap()  # by the time at which the lease on their KV is renewed
        self._num_begun = 0

    def begin(self, request: RoutedRequest, place: Place, now_s: float) -> None:
        """Send a new attempt of the request to its first instance."""
        instance = place.instance
        self._num_begun += 1
        request.num_attempts += 1
        request.attempt = attempt = Attempt(self._num_begun, request, instance, place.hand_over, now_s)
        held_tokens = attempt.num_tokens if place.hand_over else request.max_total_tokens
        instance.dispatch(attempt, attempt.num_tokens, held_tokens, self._selector.expected_tokens(attempt))
        self._selector.put(instance, is_chosen=True)
        self._selector.begun(attempt, place, now_s)
        self._selector.prefixes.record(request, instance)
        self._driver.submit(attempt, instance.instance_id, None, place.selection)

    def hand_over(self, attempt: Attempt, prefill: KnownInstance, now_s: float) -> bool:
        """Select a decode instance and send the attempt there. False: no instance can read the KV of `prefill`."""
        place = self._selector.choose_decode(attempt, prefill, now_s)
        if place is not None:
            self._begin_decode(attempt, prefill, place, now_s)
        return place is not None

    def may_hand_over_again(self, attempt: Attempt, error: TandemError) -> bool:
        """Whether another instance may fetch the KV after the decode instance has failed to fetch it.

        Only if the two instances are on different hosts: then the network between these is a likelier reason than the
        prefill instance.
        """
        prefill, failed = attempt.prefill, attempt.decode
        is_network = isinstance(error, TransferError | UnavailableError) and not isinstance(error, StaleEpochError)
        return is_network and prefill is not None and failed is not None and prefill.host != failed.host

    def hand_over_again(self, attempt: Attempt, error: TandemError, now_s: float) -> bool:
        """The attempt has ended at its decode instance: let another one fetch the KV, so that the prompt is not
        computed again. False: the prefill instance does not hold the KV, or `choose_other_decode` finds none."""
        prefill = attempt.prefill
        if prefill is None or attempt.has_transfer:
            return False
        place = self._selector.choose_other_decode(attempt, prefill, now_s)
        if place is None:
            return False
        attempt.request.num_attempts += 1
        attempt.reader_error = error
        self._begin_decode(attempt, prefill, place, now_s)
        if attempt.has_first_token:
            self.await_kv(attempt, now_s)
        return True

    def await_kv(self, attempt: Attempt, now_s: float) -> None:
        """The prompt is computed, and its KV waits for the decode instance."""
        if attempt.decode is not None:
            attempt.decode.await_kv(attempt.handle)
            self._selector.put(attempt.decode)
        self.renew_lease_later(attempt, now_s)

    def _begin_decode(self, attempt: Attempt, prefill: KnownInstance, place: Place, now_s: float) -> None:
        attempt.decode = place.instance
        if prefill.find(attempt.handle) is attempt:
            prefill.decode_chosen(attempt.handle)
            self._selector.put(prefill)
        expected_tokens = self._selector.expected_tokens(attempt)
        place.instance.dispatch(attempt, 0, attempt.request.max_total_tokens, expected_tokens)
        self._selector.put(place.instance, is_chosen=True)
        self._selector.decode_chosen(attempt, place.instance, now_s)
        self._driver.submit(attempt, place.instance.instance_id, prefill.instance_id, place.selection)

    def record_progress(self, attempt: Attempt, instance: KnownInstance, num_tokens: int) -> None:
        """The instance has computed `num_tokens` of the attempt's tokens, or had them cached."""
        if num_tokens > 0 and instance.record_progress(attempt.handle, num_tokens):
            self._selector.put(instance)

    def release_prefill(self, attempt: Attempt, now_s: float) -> None:
        """The attempt has ended at the instance that computed its prompt."""
        instance = attempt.prefill
        assert instance is not None
        attempt.prefill = None
        self._renewals.discard(attempt)
        self.release(attempt, instance, now_s)

    def release(self, attempt: Attempt, instance: KnownInstance, now_s: float) -> None:
        """The attempt has ended at that instance."""
        instance.release(attempt.handle)
        self._selector.released(attempt, instance.instance_id, now_s)
        self._selector.put(instance)

    def withdraw(self, attempt: Attempt, now_s: float) -> None:
        """Cancel the attempt at all instances where it is in flight."""
        instances = (attempt.prefill, attempt.decode)
        attempt.prefill = attempt.decode = None
        self._renewals.discard(attempt)
        for instance in instances:
            if instance is not None and instance.find(attempt.handle) is not None:
                self.release(attempt, instance, now_s)
                self._driver.cancel(attempt, instance.instance_id)

    # --- leases ------------------------------------------------------------------------------------------------------

    def renew_lease_later(self, attempt: Attempt, now_s: float) -> None:
        """Schedule the next renewal of the lease on the attempt's KV. If this router is lost, the lease ends."""
        if attempt.prefill is None:
            return
        time_s = now_s + LEASE_SHARE * attempt.prefill.status.lease_s
        if time_s < math.inf:
            self._renewals.push(attempt, time_s)
            self._wake_up.at(time_s)

    def renew_leases(self, now_s: float) -> None:
        """Renew the leases that are due."""
        for attempt in self._renewals.pop_until(now_s):
            if attempt.prefill is not None and not attempt.has_transfer:
                self._driver.renew_lease(attempt, attempt.prefill.instance_id)
                self.renew_lease_later(attempt, now_s)

    @property
    def next_renewal_s(self) -> float:
        """When the next lease is due; inf without a lease."""
        first = self._renewals.peek()
        return math.inf if first is None else first[0]

    # --- failures ----------------------------------------------------------------------------------------------------

    def blame(self, attempt: Attempt, instance: KnownInstance, error: TandemError, now_s: float) -> set[str]:
        """Record that the attempt has failed at `instance`. Returns the ids of the instances that its request should
        avoid."""
        prefill, decode, failures = attempt.prefill, attempt.decode, self._selector.failures
        # Before the transfer, a decode instance answers "unavailable" when it cannot reach the prefill instance.
        is_transfer = isinstance(error, TransferError) or (
            isinstance(error, UnavailableError) and instance is decode and not attempt.has_transfer
        )
        if isinstance(error, IncompatiblePeerError) and prefill is not None and decode is not None:
            self._selector.refuse_pair(prefill.instance_id, decode.instance_id)
            return set()  # both can work with other instances
        if is_transfer and prefill is not None and decode is not None:
            failures.add((prefill.instance_id, decode.instance_id), now_s)
            return {prefill.instance_id, decode.instance_id}  # either of them may be the reason
        if isinstance(error, UnavailableError):
            failures.add(instance.instance_id, now_s)
        return {instance.instance_id}
