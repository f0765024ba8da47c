"""What attempts have at their instances: they are sent there, followed, and taken off again."""

import math

from tandem.core.errors import IncompatiblePeerError, StaleEpochError, TandemError, TransferError, UnavailableError
from tandem.scheduling.instance_selector import InstanceSelector, Place
from tandem.scheduling.keyed_heap import KeyedHeap
from tandem.scheduling.known_instance import KnownInstance
from tandem.scheduling.routed_request import Attempt, RoutedRequest
from tandem.scheduling.routing_driver import RoutingDriver, WakeUp

LEASE_SHARE = 1 / 3  # of a lease, after which it is renewed: two renewals may come late


class Attempts:
    """Keeps the selector's instances up to date with what is in flight there, and renews leases on KV that waits."""

    __slots__ = ("_driver", "_num_begun", "_renewals", "_selector", "_wake_up")

    def __init__(self, driver: RoutingDriver, selector: InstanceSelector, wake_up: WakeUp) -> None:
        self._driver = driver
        self._selector = selector
        self._wake_up = wake_up
        self._renewals: KeyedHeap[Attempt] = KeyedHeap()  # when the leases on their KV are renewed
        self._num_begun = 0

    def begin(self, request: RoutedRequest, place: Place, now_s: float) -> None:
        """Send a new attempt to its first instance."""
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
        """Select where to decode, and send it there. False: no instance can read the KV of `prefill`."""
        place = self._selector.choose_decode(attempt, prefill, now_s)
        if place is not None:
            self._begin_decode(attempt, prefill, place, now_s)
        return place is not None

    def may_hand_over_again(self, attempt: Attempt, error: TandemError) -> bool:
        """Whether another instance may fetch the KV, after the decode instance has failed to.

        Only where the KV is on another host, so that the network between the two is a likelier reason than the instance
        that has the KV.
        """
        prefill, failed = attempt.prefill, attempt.decode
        is_network = isinstance(error, TransferError | UnavailableError) and not isinstance(error, StaleEpochError)
        return is_network and prefill is not None and failed is not None and prefill.host != failed.host

    def hand_over_again(self, attempt: Attempt, error: TandemError, now_s: float) -> bool:
        """Its decode instance has nothing of it any more: another one may fetch the KV, without computing the prompt
        again. False: the KV is not at its prefill instance, or no other is there that `choose_other_decode` takes."""
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
        """Its prompt is computed, and the KV waits for the decode instance."""
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
        """The instance need not compute `num_tokens` of its tokens any more."""
        if num_tokens > 0 and instance.record_progress(attempt.handle, num_tokens):
            self._selector.put(instance)

    def release_prefill(self, attempt: Attempt, now_s: float) -> None:
        """The instance that computed the prompt holds nothing of it any more."""
        instance = attempt.prefill
        assert instance is not None
        attempt.prefill = None
        self._renewals.discard(attempt)
        self.release(attempt, instance, now_s)

    def release(self, attempt: Attempt, instance: KnownInstance, now_s: float) -> None:
        instance.release(attempt.handle)
        self._selector.released(attempt, instance.instance_id, now_s)
        self._selector.put(instance)

    def withdraw(self, attempt: Attempt, now_s: float) -> None:
        """Cancel it at all instances where it is in flight."""
        instances = (attempt.prefill, attempt.decode)
        attempt.prefill = attempt.decode = None
        self._renewals.discard(attempt)
        for instance in instances:
            if instance is not None and instance.find(attempt.handle) is not None:
                self.release(attempt, instance, now_s)
                self._driver.cancel(attempt, instance.instance_id)

    # --- leases ------------------------------------------------------------------------------------------------------

    def renew_lease_later(self, attempt: Attempt, now_s: float) -> None:
        """The KV waits for its reader, at the longest until the deadline; the lease ends if this router is lost."""
        if attempt.prefill is None:
            return
        time_s = now_s + LEASE_SHARE * attempt.prefill.status.lease_s
        if time_s < math.inf:
            self._renewals.push(attempt, time_s)
            self._wake_up.at(time_s)

    def renew_leases(self, now_s: float) -> None:
        """Those that are due."""
        for attempt in self._renewals.pop_until(now_s):
            if attempt.prefill is not None and not attempt.has_transfer:
                self._driver.renew_lease(attempt, attempt.prefill.instance_id)
                self.renew_lease_later(attempt, now_s)

    @property
    def next_renewal_s(self) -> float:
        """When a lease is due; inf without one."""
        first = self._renewals.peek()
        return math.inf if first is None else first[0]

    # --- failures ----------------------------------------------------------------------------------------------------

    def blame(self, attempt: Attempt, instance: KnownInstance, error: TandemError, now_s: float) -> set[str]:
        """Remember that the attempt has failed at `instance`. Returns the instances that its request should avoid."""
        prefill, decode, failures = attempt.prefill, attempt.decode, self._selector.failures
        # Before its transfer, the decode instance is "unavailable" because the prefill instance is, for it.
        is_transfer = isinstance(error, TransferError) or (
            isinstance(error, UnavailableError) and instance is decode and not attempt.has_transfer
        )
        if isinstance(error, IncompatiblePeerError) and prefill is not None and decode is not None:
            self._selector.refuse_pair(prefill.instance_id, decode.instance_id)
            return set()  # each may have other partners
        if is_transfer and prefill is not None and decode is not None:
            failures.add((prefill.instance_id, decode.instance_id), now_s)
            return {prefill.instance_id, decode.instance_id}  # either end may be the reason
        if isinstance(error, UnavailableError):
            failures.add(instance.instance_id, now_s)
        return {instance.instance_id}
