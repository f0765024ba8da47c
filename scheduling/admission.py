"""Whether a new request is accepted, made best effort, or refused because it would be too late."""

import math

from tandem.core.errors import DeadlineError, OverloadedError
from tandem.scheduling.instance_selector import InstanceSelector
from tandem.scheduling.request_queue import RequestQueue
from tandem.scheduling.routed_request import RoutedRequest

WAIT_SHARE = 0.75  # a request that is expected to wait longer than this share of `max_wait_s` is refused at once
_MIN_RETRY_S = 0.1

# While the queue is empty, the predicted TTFT is a mean over all instances, and the selected instance may do better.
# So only a request that would take this many times its target is demoted or refused then.
_EMPTY_QUEUE_MARGIN = 2.0
_MIN_CHANCE = 0.01  # probability of meeting the TPOT target, below which a request is demoted or refused


class Admission:
    """Decides by the router's queue and the state of the instances. For the limits see `RoutingSettings`."""

    def __init__(
        self, queue: RequestQueue, selector: InstanceSelector, *, max_queue: int | None, max_wait_s: float
    ) -> None:
        self._queue = queue
        self._selector = selector
        self._max_queue = max_queue
        self._max_wait_s = max_wait_s

    def check(self, request: RoutedRequest, now_s: float, *, num_others: int) -> None:
        """Predict TTFT and TPOT of a new request, and make it best effort if one misses its target. `num_others` counts
        the other requests in the router.

        Raises DeadlineError if the deadline has passed, OverloadedError if the router is full, if the request would
        miss a target and its class refuses it then, or if it would wait too long, ContextLengthError if the prompt is
        too long, and UnavailableError without a usable instance.
        """
        if request.deadline_s <= now_s:
            raise DeadlineError("the request's deadline has passed")
        if self._max_queue is not None and num_others >= self._max_queue:
            raise OverloadedError(
                f"the router already holds {self._max_queue} requests; try again later", reason="queue-full"
            )
        self._selector.length.check(request.num_prompt_tokens)
        is_alone = num_others == 0
        self._check_ttft(request, now_s, is_alone)
        self._check_tpot(request, now_s, is_alone)
        self._check_wait(request, now_s)

    def _expected_ttft_s(self, request: RoutedRequest, now_s: float) -> float | None:
        """Predicted TTFT, the time since the request was received included. None: nothing is measured yet."""
        first_token_s = self._queue.first_token_time.expected_s(request.num_tokens)
        if not first_token_s:
            return None
        return now_s - request.received_s + self._queue.expected_wait_s(now_s, request) + first_token_s

    def _check_ttft(self, request: RoutedRequest, now_s: float, is_alone: bool) -> None:
        """Make the request best effort if it cannot meet its TTFT target; raises OverloadedError if its class refuses
        it then. A request that is alone in the router passes: it shows whether the prediction still holds."""
        request.predicted_ttft_s = expected_s = self._expected_ttft_s(request, now_s)
        slo = request.slo
        if expected_s is None or slo.ttft_s == math.inf or is_alone:
            return
        margin = 1.0 if len(self._queue) else _EMPTY_QUEUE_MARGIN
        if expected_s <= margin * slo.ttft_s and not self._queue.leaves_out(request, now_s):
            return
        text = f"the first token is expected after {expected_s:.3g} s, and the target is {slo.ttft_s:.3g} s"
        if slo.if_unmet == "refuse":
            raise OverloadedError(
                f"the request would miss its TTFT target: {text}; try again later",
                retry_after_s=max(expected_s - slo.ttft_s, _MIN_RETRY_S),
                reason="ttft-target",
            )
        request.demoted_because = text

    def _check_tpot(self, request: RoutedRequest, now_s: float, is_alone: bool) -> None:
        """As `_check_ttft`, for TPOT. A small chance is enough: running requests may end soon."""
        if is_alone or request.demoted_because is not None:
            return
        expected = self._selector.expected_tpot(request, now_s)
        if expected is None or expected[1] >= _MIN_CHANCE:
            return
        tpot_s = expected[0]
        text = f"a time per token of {tpot_s:.3g} s is expected at best, and the target is {request.slo.tpot_s:.3g} s"
        if request.slo.if_unmet == "refuse":
            raise OverloadedError(
                f"the request would miss its TPOT target: {text}; try again later",
                retry_after_s=tpot_s * self._selector.answer_lengths.mean_tokens / 2,  # half of the answers have ended
                reason="tpot-target",
            )
        request.demoted_because = text

    def _check_wait(self, request: RoutedRequest, now_s: float) -> None:
        """Raises OverloadedError if the request would wait too long, or beyond its deadline."""
        wait_s = self._queue.expected_wait_s(now_s, request)
        longest_s = WAIT_SHARE * self._max_wait_s
        if wait_s > longest_s:
            raise OverloadedError(
                f"{len(self._queue)} requests wait for an instance already, and another one would for about "
                f"{wait_s:.0f} s; try again later",
                retry_after_s=wait_s - longest_s,
                reason="max-wait",
            )
        if wait_s > request.deadline_s - now_s:
            raise OverloadedError(
                f"the request would wait for an instance for about {wait_s:.0f} s, beyond its deadline",
                retry_after_s=wait_s - (request.deadline_s - now_s),
                reason="deadline",
            )

    def last_start_s(self, request: RoutedRequest, now_s: float) -> float:
        """Until when a request may wait in the queue that begins to wait now."""
        until_s = now_s + self._max_wait_s
        return min(until_s, max(request.due_s, now_s)) if request.slo.if_unmet == "refuse" else until_s

    def waited_in_vain(self, request: RoutedRequest, now_s: float) -> OverloadedError:
        """The error of a request that has waited until `last_start_s` without an attempt."""
        if request.slo.if_unmet == "refuse" and now_s >= request.due_s:
            return OverloadedError(
                f"no instance had room for the request within its TTFT target of {request.slo.ttft_s:.3g} s",
                retry_after_s=max(self._queue.expected_wait_s(now_s), _MIN_RETRY_S),
                reason="ttft-target",
            )
        return OverloadedError(
            f"no instance had room for the request in {self._max_wait_s:g} s",
            retry_after_s=max(self._queue.expected_wait_s(now_s), _MIN_RETRY_S),
            reason="max-wait",
        )
