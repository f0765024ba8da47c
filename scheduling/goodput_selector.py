"""Selects instances by expected goodput: P(the new request is on time) minus the expected loss of running requests.

    remote     a prefill and a decode instance        TTFT = wait there + uncached tokens
    local      a decode instance computes the prompt  TTFT = wait + uncached tokens in chunks beside its batch
    colocated  as local, on a colocated instance
    wait       the best of these has no credit, and no other instance of its role has: the request stays in the queue

TPOT is the step time of the batch that the request would join, as that batch is expected after the prefill, divided by
the share of time that prompts leave, plus the transfer for remote prefill. With the present load instead, prefill and
decode load would oscillate (Mooncake, FAST '25). Probabilities come from the errors of earlier predictions. Candidates
are the few instances with the least load in tokens, so a decision among k candidates costs O(k^2), whatever the number
of instances. Without reported step costs the decision is that of `InstanceSelector`.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from tandem.core.session import Role
from tandem.scheduling.decode_index import DecodeQuery
from tandem.scheduling.instance_index import NO_INSTANCES
from tandem.scheduling.instance_selector import InstanceSelector, Place
from tandem.scheduling.known_instance import KnownInstance
from tandem.scheduling.predictor import LinearPredictor, Residuals
from tandem.scheduling.prefix_tracker import PrefixTracker
from tandem.scheduling.priced_load import PricedLoad
from tandem.scheduling.routed_request import Attempt, RoutedRequest
from tandem.scheduling.routing import Candidate, Selection
from tandem.scheduling.routing_settings import RoutingSettings

NUM_CANDIDATES = 4  # of each role
MIN_ERROR = 0.05  # relative error of a prediction, at least: later arrivals and departures are unknown
REMOTE_MARGIN = 0.05  # score by which another form must beat remote prefill, so that equal ones do not alternate
SCORE_TOLERANCE = 0.02  # scores that differ by less count as equal, and the lowest latency decides

_FIRST_TRANSFER_S = (0.001, 1e-6)  # prior of the seconds from first token to committed KV: constant, and per token


class Estimate(NamedTuple):
    """The prediction for one option. `ttft_s` counts from now. `on_time` is the probability that the request meets both
    targets, `loss` the expected weight of running requests that miss theirs because of it, plus 1 for each recent
    failure of the option's instances."""

    place: Place
    ttft_s: float
    tpot_s: float
    on_time: float
    loss: float
    score: float


class GoodputSelector(InstanceSelector):
    """As `InstanceSelector`. Also owns the load of each instance in seconds, and the errors of predictions."""

    def __init__(
        self, settings: RoutingSettings, *, explain: bool = True, tracker_type: type[PrefixTracker] = PrefixTracker
    ) -> None:
        super().__init__(settings, explain=explain, tracker_type=tracker_type)
        self.ttft_errors = {True: Residuals(), False: Residuals()}  # by `hand_over`: remote and local prefill
        self.tpot_errors = Residuals()
        self.transfer = LinearPredictor(_FIRST_TRANSFER_S)  # terms: 1, number of tokens
        self._loads: dict[str, PricedLoad] = {}
        self._unplaced: set[int] = set()  # handles of attempts whose decode instance is not selected yet

    def prediction_errors(self) -> Mapping[str, Residuals]:
        remote, local = self.ttft_errors[True], self.ttft_errors[False]
        return {"ttft_remote": remote, "ttft_local": local, "tpot": self.tpot_errors}

    def expected_tpot(self, request: RoutedRequest, now_s: float) -> tuple[float, float] | None:
        slo = request.slo
        if slo.tpot_s == math.inf or request.growth_tokens <= 1:
            return None
        query = DecodeQuery(request.num_tokens, request.growth_tokens, request.num_tokens + 1, None, request.avoid)
        places = [each for index in (self._decodes, self._colocated) for each in index.top(query, NUM_CANDIDATES)]
        if not places or not all(each in self._loads for each in places):
            return None
        tpot_s = min(self._tpots(each, request, 0.0, 0.0, now_s)[1] for each in places)
        return tpot_s, self.tpot_errors.share_within(tpot_s, slo.tpot_s, MIN_ERROR)

    # --- instances and attempts --------------------------------------------------------------------------------------

    def update(self, instance: KnownInstance) -> None:
        super().update(instance)
        costs = instance.status.step_cost
        load = self._loads.get(instance.instance_id)
        if costs is None:
            return
        if load is None:
            self._loads[instance.instance_id] = PricedLoad(costs)
        else:
            load.costs = costs

    def remove(self, instance_id: str) -> None:
        super().remove(instance_id)
        self._loads.pop(instance_id, None)

    def begun(self, attempt: Attempt, place: Place, now_s: float) -> None:
        attempt.expected = place.expected
        if attempt.hand_over:
            self._unplaced.add(attempt.handle)
        load = self._loads.get(place.instance.instance_id)
        if load is None:
            return
        cached = self.prefixes.tokens(attempt.request, place.instance)
        load.add_prompt(attempt.handle, attempt.num_tokens - cached, cached, now_s)
        if not attempt.hand_over:
            load.add_decode(attempt.handle, attempt.num_tokens, attempt.request.effective_slo)

    def decode_chosen(self, attempt: Attempt, instance: KnownInstance, now_s: float) -> None:
        self._unplaced.discard(attempt.handle)
        if (load := self._loads.get(instance.instance_id)) is not None:
            load.add_decode(attempt.handle, attempt.num_tokens, attempt.request.effective_slo)

    def first_token(self, attempt: Attempt, now_s: float) -> None:
        attempt.first_token_s = now_s
        if attempt.expected is not None:
            self.ttft_errors[attempt.hand_over].add(attempt.expected[0], now_s - attempt.begun_s)
        if attempt.prefill is not None and (load := self._loads.get(attempt.prefill.instance_id)) is not None:
            load.prompt_done(attempt.handle, now_s)

    def transferred(self, attempt: Attempt, now_s: float) -> None:
        if attempt.first_token_s is not None:
            self.transfer.observe((1.0, attempt.num_tokens), now_s - attempt.first_token_s)

    def finished(self, attempt: Attempt, now_s: float) -> None:
        request = attempt.request
        num_tokens = request.num_output_tokens - (request.max_tokens - attempt.growth_tokens)
        if attempt.expected is not None and num_tokens > 1 and attempt.first_token_s is not None:
            tpot_s = (now_s - attempt.first_token_s) / (num_tokens - 1)
            self.tpot_errors.add(attempt.expected[1], tpot_s)

    def released(self, attempt: Attempt, instance_id: str, now_s: float) -> None:
        self._unplaced.discard(attempt.handle)
        if (load := self._loads.get(instance_id)) is not None:
            load.remove(attempt.handle, now_s)

    # --- decisions ---------------------------------------------------------------------------------------------------

    def _choose(
        self, request: RoutedRequest, needed_tokens: int, failures: Mapping[str, float], now_s: float
    ) -> Place | None:
        estimates = self._estimates(request, needed_tokens, failures, now_s)
        if not estimates:
            return super()._choose(request, needed_tokens, failures, now_s)
        best = _best(estimates, request)
        without_credit = self._credit.without
        if best.place.instance.instance_id in without_credit:
            others = [each for each in estimates if each.place.instance.instance_id not in without_credit]
            others = [each for each in others if each.place.instance.role is best.place.instance.role]
            if not others:
                return None  # the request waits for this form, which is better than to begin at once in another
            best = _best(others, request)
        place = best.place._replace(expected=(best.ttft_s, best.tpot_s))
        return place._replace(selection=_explained(best, estimates)) if self._explain else place

    def _estimates(
        self, request: RoutedRequest, needed_tokens: int, failures: Mapping[str, float], now_s: float
    ) -> list[Estimate]:
        """One for each option among the candidates, with credit or without. Empty if a candidate reports no step
        costs."""
        query = DecodeQuery(
            request.num_tokens,
            request.growth_tokens,
            needed_tokens,
            None,
            request.avoid,
            NO_INSTANCES,
            failures,
        )
        prefill_query = self._prefill_query(request, needed_tokens, failures)
        prefills = self._prefills.top(prefill_query, NUM_CANDIDATES)
        decodes = self._decodes.top(query, NUM_CANDIDATES)
        local = [*(decodes if self._settings.local_prefill else ()), *self._colocated.top(query, NUM_CANDIDATES)]
        if not all(each in self._loads for each in (*prefills, *decodes, *local)):
            return []
        remote_estimates = (self._remote(request, self.instances[each], decodes, failures, now_s) for each in prefills)
        local_estimates = (self._local(request, self.instances[each], failures, now_s) for each in local)
        return [*(each for each in remote_estimates if each is not None), *local_estimates]

    def _remote(
        self,
        request: RoutedRequest,
        prefill: KnownInstance,
        decodes: Iterable[str],
        failures: Mapping[str, float],
        now_s: float,
    ) -> Estimate | None:
        """Estimate for `prefill` with the best of `decodes` that can read its KV; None if none can."""
        refused = self.failures.incompatible_readers(prefill.instance_id)
        readers = [
            each
            for each in decodes
            if self.instances[each].status.fingerprint == prefill.status.fingerprint and each not in refused
        ]
        if not readers:
            return None
        if self.failures:
            suspects = self.failures.suspect_readers(prefill, self.instances)
            readers = [each for each in readers if each not in suspects] or readers
        load, place = self._loads[prefill.instance_id], Place(prefill, True, None)
        cached = self.prefixes.tokens(request, prefill)
        price_s = load.price_s(request.num_tokens - cached, cached)
        ttft_s = load.wait_s(now_s) + max(load.costs.step_s, price_s)
        num_gaps = max(1.0, self.answer_lengths.expected_tokens(request.growth_tokens) - 1)
        transfer_s = self.transfer.seconds((1.0, request.num_tokens)) / num_gaps  # share of each output token
        estimates = []
        for decode_id in readers:
            before_s, after_s = self._tpots(decode_id, request, ttft_s, 0.0, now_s)
            loss = self._loss(decode_id, before_s, after_s)
            loss += failures.get(prefill.instance_id, 0.0) + failures.get(decode_id, 0.0)
            estimates.append(self._estimate(place, request, ttft_s, after_s + transfer_s, loss, now_s))
        return max(estimates, key=lambda pair: (pair.score, -pair.tpot_s))

    def _local(
        self, request: RoutedRequest, instance: KnownInstance, failures: Mapping[str, float], now_s: float
    ) -> Estimate:
        load = self._loads[instance.instance_id]
        cached = self.prefixes.tokens(request, instance)
        ttft_s = load.local_ttft_s(request.num_tokens - cached, cached, now_s)
        price_s = load.price_s(request.num_tokens - cached, cached)
        before_s, after_s = self._tpots(instance.instance_id, request, ttft_s, price_s, now_s)
        loss = self._loss(instance.instance_id, before_s, after_s) + failures.get(instance.instance_id, 0.0)
        return self._estimate(Place(instance, False, None), request, ttft_s, after_s, loss, now_s)

    def _estimate(
        self, place: Place, request: RoutedRequest, ttft_s: float, tpot_s: float, loss: float, now_s: float
    ) -> Estimate:
        slo = request.effective_slo
        on_time = self.ttft_errors[place.hand_over].share_within(ttft_s, request.due_s - now_s, MIN_ERROR)
        if request.growth_tokens > 1:
            on_time *= self.tpot_errors.share_within(tpot_s, slo.tpot_s, MIN_ERROR)
        if not slo.has_targets:
            on_time = 0.0  # it adds no goodput, so that only losses and then latency decide
        return Estimate(place, ttft_s, tpot_s, on_time, loss, slo.weight * on_time - loss)

    def _tpots(
        self, instance_id: str, request: RoutedRequest, after_s: float, price_s: float, now_s: float
    ) -> tuple[float, float]:
        """TPOT of the instance after `after_s` seconds: without the request and with it. `price_s`: time that the
        instance spends on the request's prompt."""
        load = self._loads[instance_id]
        share = load.prompt_share(now_s)
        rows, context = float(load.decoding), float(load.context_tokens)
        tpot_s = load.tpot_s(rows, context, share)
        answer_tokens = self.answer_lengths.mean_tokens
        staying_share = max(0.0, 1 - after_s / (answer_tokens * tpot_s))
        mean_tokens = context / rows if rows else request.num_tokens
        num_decodes = len(self._decodes) or 1
        arriving = len(self._unplaced) / num_decodes if self.instances[instance_id].role is Role.DECODE else 0.0
        rows = max(rows, staying_share * rows + arriving)  # unknown later requests replace those that leave
        context = rows * (mean_tokens + answer_tokens / 2)
        before_s = load.tpot_s(rows, context, share)
        share += price_s / max(1.0, answer_tokens * tpot_s)
        return before_s, load.tpot_s(rows + 1, context + request.num_tokens + answer_tokens / 2, share)

    def _loss(self, instance_id: str, before_s: float, after_s: float) -> float:
        within, load = self.tpot_errors.share_within, self._loads[instance_id]
        return sum(
            weight * (within(before_s, target_s, MIN_ERROR) - within(after_s, target_s, MIN_ERROR))
            for target_s, weight in load.tpot_targets()
        )

    # --- the decode instance of a pair -------------------------------------------------------------------------------

    def choose_decode(self, attempt: Attempt, prefill: KnownInstance, now_s: float) -> Place | None:
        query = self._decode_query(attempt, prefill, now_s)
        top = self._decodes.top(query, NUM_CANDIDATES)
        if not top or not all(each in self._loads for each in top):
            return super().choose_decode(attempt, prefill, now_s)
        request = attempt.request
        wait_s = self._loads[prefill.instance_id].wait_s(now_s) if prefill.instance_id in self._loads else 0.0
        estimates = []
        for decode_id in top:
            before_s, after_s = self._tpots(decode_id, request, wait_s, 0.0, now_s)
            place = Place(self.instances[decode_id], False, None)
            slo = request.effective_slo
            on_time = self.tpot_errors.share_within(after_s, slo.tpot_s, MIN_ERROR)
            loss = self._loss(decode_id, before_s, after_s) + query.failures.get(decode_id, 0.0)
            estimates.append(
                Estimate(place, 0.0, after_s, on_time, loss, request.effective_slo.weight * on_time - loss)
            )
        best = _best(estimates, request)
        return best.place._replace(selection=_explained(best, estimates)) if self._explain else best.place


def _best(estimates: list[Estimate], request: RoutedRequest) -> Estimate:
    """The highest score. Nearly equal scores: the lowest latency, but remote prefill unless another form is clearly
    better."""

    def margin(each: Estimate) -> float:
        return 0.0 if each.place.hand_over else REMOTE_MARGIN

    def latency(each: Estimate) -> float:
        """In multiples of the targets, or without targets in seconds of the complete answer."""
        slo = request.effective_slo
        if slo.has_targets:
            return each.ttft_s / slo.ttft_s + each.tpot_s / slo.tpot_s + margin(each)
        return (each.ttft_s + each.tpot_s * request.growth_tokens) * (1 + margin(each))

    has_remote = any(each.place.hand_over for each in estimates)
    scores = {id(each): each.score - (margin(each) if has_remote else 0.0) for each in estimates}
    highest = max(scores.values())
    return min((each for each in estimates if scores[id(each)] >= highest - SCORE_TOLERANCE), key=latency)


def _explained(best: Estimate, estimates: list[Estimate]) -> Selection:
    candidates = []
    for each in sorted(estimates, key=lambda each: (each is not best, -each.score)):
        terms = (
            ("ttft_ms", round(1000 * each.ttft_s, 1)),
            ("tpot_ms", round(1000 * each.tpot_s, 2)),
            ("on_time", round(each.on_time, 3)),
            ("loss", round(each.loss, 3)),
        )
        reason = "" if each is best else f"worse by {best.score - each.score:.3g}"
        candidates.append(Candidate(each.place.instance.instance_id, -each.score, terms, reason))
    return Selection(best.place.instance.instance_id, tuple(candidates))
