"""The router's decisions as one state machine: where a request goes, what happens when that fails, and when it ends.

    submit --+--> queued: no instance has credit --+
             |                                     v
             +---------------------------------> attempt -----> finished
                                                   |   ^
                         an instance has failed it |   | another one is there, or the pause is over
                                                   v   |
                                               recovering ----> error: too many attempts, no instance came in time,
                                                                or a fault of the request
    (in every state: its deadline, or the client has cancelled it)

    an attempt at a pair                                      an attempt at one instance
    prefill started   -> the decode instance is chosen        prefill started
    prefill finished  -> the first token                      prefill finished  -> the first token
    transfer failed   -> perhaps another decode instance      tokens ... finished
    transfer committed-> prefill holds nothing more
    tokens ... finished

The machine knows counts and ids, never tokens or text. It has no clock, no I/O and no randomness: time comes with each
event, and decisions go to a `RoutingDriver`. The live router and the simulator are the two drivers, so both decide
alike. An event of an attempt returns False if the attempt is not in flight there any more; the driver then drops it.
"""

import math
from collections.abc import Hashable, Mapping

from tandem.core.errors import DeadlineError, InternalError, StaleEpochError, TandemError, UnavailableError
from tandem.core.generation import BlockNamer
from tandem.core.request_slo import NO_SLO, RequestSlo
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
    """Owns all requests until they end. Used by one thread."""

    def __init__(
        self,
        driver: RoutingDriver,
        settings: RoutingSettings,
        *,
        explain: bool = True,
        selector_type: type[InstanceSelector] | None = None,
        tracker_type: type[PrefixTracker] = PrefixTracker,
    ) -> None:
        """`explain`: give the driver the comparison behind each decision; the decisions are the same without.
        `selector_type`: a policy other than that of the settings. `tracker_type`: for names of blocks other than
        hashes."""
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
        self._num_requests = 0

    # --- instances ---------------------------------------------------------------------------------------------------

    @property
    def instances(self) -> Mapping[str, KnownInstance]:
        return self._selector.instances

    def instance_reported(self, status: InstanceStatus, now_s: float) -> None:
        """Its first report, or the next one. It may have another role than before."""
        has_news = self._selector.failures.cannot_reach(status.instance_id, status.unreachable_peers)
        known = self._selector.instances.get(status.instance_id)
        if known is None:
            self._selector.update(KnownInstance(status))
            return
        before = known.offer
        if known.role is not status.role:
            self._selector.leave_role(known)
        known.report(status)
        self._selector.update(known)
        if has_news or known.offer != before:
            self._offers_changed()
            self._settle(now_s)

    def instance_connected(self, instance_id: str, now_s: float) -> None:
        """Attempts can be sent there."""
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
                if not attempt.has_started:  # it met a death that was not known yet: many at once use up no attempts
                    attempt.request.num_attempts -= 1
                self._fail(attempt, error, {instance_id}, now_s)
        self._settle(now_s)

    def instance_removed(self, instance_id: str, now_s: float) -> None:
        """The instance is gone for good. A later one of the same id starts with an empty cache."""
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
        """How long a newcomer would wait for credit, at the rate of the last seconds."""
        return self._queue.expected_wait_s(now_s)

    def prediction_errors(self) -> Mapping[str, Residuals]:
        """Of the times that decisions were based on, by the kind of time; empty for a policy that predicts none."""
        return self._selector.prediction_errors()

    def submit(
        self,
        key: Hashable,
        *,
        num_prompt_tokens: int,
        max_tokens: int,
        deadline_s: float,
        now_s: float,
        name_blocks: BlockNamer | None = None,
        client: str = "",
        slo: RequestSlo = NO_SLO,
        received_s: float | None = None,
    ) -> RoutedRequest:
        """A new request, received now if `received_s` is None. `key` is of no other that runs; for the other arguments
        see `RoutedRequest`.

        Raises DeadlineError, OverloadedError, UnavailableError or ContextLengthError if it cannot be accepted.
        """
        assert key not in self._requests, "two requests of one key"
        self._num_requests += 1
        request = RoutedRequest(
            key,
            self._num_requests,
            num_prompt_tokens,
            max_tokens,
            deadline_s,
            name_blocks,
            client,
            slo,
            now_s if received_s is None else received_s,
        )
        self._waiting.admission.check(request, now_s, num_others=len(self._requests))
        self._requests[key] = request
        self._ledger.open(client)
        if deadline_s < math.inf:
            self._deadlines.push(request, deadline_s)
            self._wake_up.at(deadline_s)
        self._waiting.add(request, now_s)
        return request

    def cancel(self, request: RoutedRequest, now_s: float) -> None:
        """The client has cancelled the request. `end` is not called. An ended request is ignored."""
        if self._requests.get(request.key) is request:
            self._forget(request, now_s)
            self._settle(now_s)

    def advance(self, now_s: float) -> None:
        """Time has passed: end requests whose deadline is over, and retry those whose pause is over."""
        self._wake_up.came()
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
        """The attempt of that handle, if it is in flight at that instance."""
        instance = self._selector.instances.get(instance_id)
        return None if instance is None else instance.find(handle)

    def prefill_started(self, attempt: Attempt, num_cached_tokens: int, now_s: float) -> bool:
        """Late binding: the decode instance is chosen now, so that queued prompts hold no memory there. A prompt that
        was preempted starts again; only the first time counts."""
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
        """The first token of the attempt is here. `is_last`: there are no more."""
        instance = attempt.prefill
        if instance is None:
            return False
        if attempt.has_first_token:
            self._fail(attempt, InternalError("a prefill worker answered twice"), {instance.instance_id}, now_s)
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
        """The KV is the decode instance's; the prefill instance holds nothing more."""
        if attempt.decode is None or attempt.has_transfer:
            return False
        attempt.has_transfer = True
        attempt.decode.kv_came(attempt.handle)
        self._selector.transferred(attempt, now_s)
        self._selector.put(attempt.decode)
        if attempt.has_first_token and attempt.prefill is not None:
            self._attempts.release_prefill(attempt, now_s)
        self._settle(now_s)
        return True

    def tokens_generated(self, attempt: Attempt, count: int, now_s: float) -> bool:
        """Tokens after the first are here."""
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
        """All its tokens are here."""
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
        """The instance has ended the attempt with an error, and has freed all blocks of it."""
        instance = self._selector.instances.get(instance_id)
        if instance is None or instance.find(attempt.handle) is None:
            return False
        # The instance that was to read the KV before had taken it over already: nobody is to blame for that.
        was_taken = attempt.reader_error is not None and isinstance(error, StaleEpochError)
        blamed = set() if was_taken else self._attempts.blame(attempt, instance, error, now_s)
        self._attempts.release(attempt, instance, now_s)
        is_again = instance is attempt.decode and self._attempts.may_hand_over_again(attempt, error)
        if not (is_again and self._hand_over_again(attempt, error, now_s)):
            if was_taken:
                attempt.request.num_attempts -= 1
            self._fail(attempt, error, blamed, now_s)
        self._settle(now_s)
        return True

    # --- an attempt's steps ------------------------------------------------------------------------------------------

    def _hand_over(self, attempt: Attempt, prefill: KnownInstance, now_s: float) -> None:
        if not self._attempts.hand_over(attempt, prefill, now_s):
            error = UnavailableError("no decode worker is ready that can read the prefill worker's KV")
            self._fail(attempt, error, set(), now_s)

    def _hand_over_again(self, attempt: Attempt, error: TandemError, now_s: float) -> bool:
        may_continue = self._waiting.may_continue(attempt.request)
        return may_continue and self._attempts.hand_over_again(attempt, error, now_s)

    def _fail(self, attempt: Attempt, error: TandemError, blamed: set[str], now_s: float) -> None:
        """`blamed` are the instances that further attempts should rather not use."""
        attempt.error = error
        self._attempts.withdraw(attempt, now_s)
        request = attempt.request
        request.attempt = None
        request.avoid |= blamed
        if (last := self._waiting.take_back(request, error, now_s)) is not None:
            self._end(request, last, now_s)

    def _settle(self, now_s: float) -> None:
        """An instance may take more: try the requests again that wait."""
        self._end_all(self._waiting.settle(now_s), now_s)

    # --- end ---------------------------------------------------------------------------------------------------------

    def _end(self, request: RoutedRequest, error: TandemError | None, now_s: float) -> None:
        if error is None:
            self._selector.answer_lengths.observe(request.num_output_tokens)
        self._forget(request, now_s)
        self._driver.end(request, error)

    def _end_all(self, ended: Ended, now_s: float) -> None:
        """Those that have not ended meanwhile: the end of one may have the driver cancel another."""
        for request, error in ended:
            if self._requests.get(request.key) is request:
                self._end(request, error, now_s)

    def _forget(self, request: RoutedRequest, now_s: float) -> None:
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
