"""Selects the instances of an attempt among the usable ones, in a time that hardly depends on their number.

A request runs on a pair (a prefill instance, then a decode instance that reads its KV) or on one colocated instance. If
the cluster has both forms, the one with the least work before the first token is selected. If it has neither (no
prefill instance, or none whose KV a decode instance can read, as during a rolling update), a decode instance computes
the prompt itself: degraded service instead of none.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from tandem.core.session import Role
from tandem.scheduling.answer_lengths import AnswerLengths
from tandem.scheduling.cached_prefixes import CachedPrefixes
from tandem.scheduling.decode_index import DecodeIndex, DecodeQuery
from tandem.scheduling.instance_credit import InstanceCredit
from tandem.scheduling.instance_index import NO_FAILURES, NO_INSTANCES, InstanceIndex, QueryT
from tandem.scheduling.known_instance import KnownInstance
from tandem.scheduling.predictor import Residuals
from tandem.scheduling.prefill_index import PrefillIndex, PrefillQuery
from tandem.scheduling.prefix_tracker import PrefixTracker
from tandem.scheduling.recent_failures import RecentFailures
from tandem.scheduling.routed_request import Attempt, RoutedRequest
from tandem.scheduling.routing import Candidate, Selection
from tandem.scheduling.routing_settings import RoutingSettings
from tandem.scheduling.servable_length import ServableLength


class Place(NamedTuple):
    """A selected instance. `hand_over`: it computes only the prompt. `selection` explains the decision; None without
    explanations. `expected`: TTFT from now and TPOT in seconds, as predicted; None from a selector that predicts none.
    """

    instance: KnownInstance
    hand_over: bool
    selection: Selection | None
    expected: tuple[float, float] | None = None


class _Form(NamedTuple):
    """A pair or a colocated instance in a comparison by the first five fields: the lowest wins."""

    has_failed: bool
    must_wait: bool
    work_tokens: int
    decode_load: float
    has_transfer: bool
    place: Place

    def lost_to(self, best: "_Form") -> str:
        """The reason for the decision, in words."""
        if self.has_failed is not best.has_failed:
            return "it failed the request"
        if self.must_wait is not best.must_wait:
            return "no memory to decode there"
        if (more := self.work_tokens - best.work_tokens) > 0:
            return f"{more} tokens more to compute before the first token"
        if (more_load := self.decode_load - best.decode_load) > 0:
            return f"as much to compute before the first token, decoding more loaded by {more_load:g}"
        return "equal, but for a transfer of KV"


class InstanceSelector:
    """Owns the router's knowledge of instances: reports and load, cached prefixes, recent failures, servable length."""

    def __init__(
        self, settings: RoutingSettings, *, explain: bool = True, tracker_type: type[PrefixTracker] = PrefixTracker
    ) -> None:
        """`explain`: places have a `selection`. `tracker_type`: for block names that are not hashes."""
        self.instances: dict[str, KnownInstance] = {}  # to be read only
        self.failures = RecentFailures()
        self.length = ServableLength(self.instances, self.failures, local_prefill=settings.local_prefill)
        self.prefixes = CachedPrefixes(tracker_type, settings.max_tracked_blocks)
        self._settings = settings
        self._explain = explain
        self._prefills = PrefillIndex(settings.slack_tokens)
        self._decodes = DecodeIndex()
        self._colocated = DecodeIndex()
        self._credit = InstanceCredit(settings)
        self.answer_lengths = AnswerLengths()

    # --- instances ---------------------------------------------------------------------------------------------------

    def update(self, instance: KnownInstance) -> None:
        """The instance is new, or has reported."""
        self.instances[instance.instance_id] = instance
        self.put(instance)

    def put(self, instance: KnownInstance, *, is_chosen: bool = False) -> None:
        """The load of the instance has changed, or its report. `is_chosen`: the instance was selected."""
        if (role := instance.role) is Role.PREFILL:
            prefills = self._prefills
            (prefills.take if is_chosen else prefills.put)(instance.prefill_view())
        else:
            index = self._decodes if role is Role.DECODE else self._colocated
            (index.take if is_chosen else index.put)(instance.decode_view())
        self._credit.update(instance)

    def expected_tokens(self, attempt: Attempt) -> int:
        """KV slots that the attempt will probably need to decode; 0 if its first token is its last."""
        if attempt.growth_tokens <= 1:
            return 0
        return attempt.num_tokens + self.answer_lengths.expected_tokens(attempt.growth_tokens)

    def leave_role(self, instance: KnownInstance) -> None:
        """The instance is no longer a candidate in its present role."""
        self._credit.leave_role(instance.instance_id)
        index: PrefillIndex | DecodeIndex = self._prefills
        if instance.role is not Role.PREFILL:
            index = self._decodes if instance.role is Role.DECODE else self._colocated
        index.remove(instance.instance_id)

    def remove(self, instance_id: str) -> None:
        """The instance is gone."""
        self.leave_role(self.instances.pop(instance_id))
        self._credit.remove(instance_id)
        self.failures.forget(instance_id)
        self.prefixes.forget(instance_id)

    def refuse_pair(self, prefill_id: str, decode_id: str) -> None:
        """The two instances cannot exchange KV: they are not selected together again."""
        self.failures.add_incompatible(prefill_id, decode_id)
        self.length.changed()

    def waits_for_credit(self, request: RoutedRequest) -> bool:
        """For a request for which no place was found: whether an instance is usable, and only credit is missing."""
        return self._credit.is_limited and request.num_tokens < self.length.tokens

    # --- the first instance ------------------------------------------------------------------------------------------

    def choose_first(self, request: RoutedRequest, now_s: float) -> Place | None:
        """The first instance of a new attempt: one that holds prompt and answer, or as much of the answer as any
        instance does. Instances that have failed the request are a last resort. None: no usable instance, or none with
        credit."""
        longest_tokens = self.length.tokens
        needed_tokens = min(request.max_total_tokens, longest_tokens)
        if request.num_tokens >= longest_tokens:
            return None
        failures: Mapping[str, float] = self.failures.current(now_s) if self.failures else NO_FAILURES
        if self.length.is_local:
            return self._one_instance(self._decodes, request, needed_tokens, failures)
        return self._choose(request, needed_tokens, failures, now_s)

    def _choose(
        self, request: RoutedRequest, needed_tokens: int, failures: Mapping[str, float], now_s: float
    ) -> Place | None:
        if not self._colocated.views:
            return self._pair(request, needed_tokens, failures)
        pair = self._pair(request, needed_tokens, failures)
        colocated = self._one_instance(self._colocated, request, needed_tokens, failures)
        if pair is None or colocated is None:
            return pair or colocated
        return self._better_form(request, pair, colocated, needed_tokens)

    def _pair(self, request: RoutedRequest, needed_tokens: int, failures: Mapping[str, float]) -> Place | None:
        query, without_credit = self._prefill_query(request, needed_tokens, failures), self._credit.without
        excluded = query.exclude | without_credit if query.exclude else without_credit  # without a copy where possible
        return self._find(self._prefills, query._replace(exclude=excluded), hand_over=True)

    def _prefill_query(self, request: RoutedRequest, needed_tokens: int, failures: Mapping[str, float]) -> PrefillQuery:
        """A query over all prefill instances, with credit or without. It excludes instances whose links are all
        suspect, if there are others."""
        if self.failures:
            failures = self.failures.of_prefills(failures, self.instances)
        query = PrefillQuery(
            request.num_tokens,
            needed_tokens,
            self._credit.with_memory(self._decodes.fingerprints_for(needed_tokens)),
            self.prefixes.holders(request),
            request.avoid,
            self.failures.prefills_without_reader(self.instances),
            failures,
        )
        suspects = self.failures.prefills_with_suspect_links(self.instances) if self.failures else NO_INSTANCES
        others = query._replace(exclude=query.exclude | suspects)
        return others if suspects and self._prefills.best(others) is not None else query

    def _one_instance(
        self, index: DecodeIndex, request: RoutedRequest, needed_tokens: int, failures: Mapping[str, float]
    ) -> Place | None:
        query = DecodeQuery(
            request.num_tokens,
            request.growth_tokens,
            needed_tokens,
            None,
            request.avoid,
            self._credit.without,
            failures,
        )
        return self._find(index, query, hand_over=False)

    def _find(self, index: InstanceIndex[Any, QueryT], query: QueryT, *, hand_over: bool) -> Place | None:
        if not self._explain:
            best = index.best(query)
            return None if best is None else Place(self.instances[best.rank[3]], hand_over, None)
        selection = index.select(query)
        if selection.instance_id is None:
            return None
        return Place(self.instances[selection.instance_id], hand_over, selection)

    # --- a pair or a colocated instance ------------------------------------------------------------------------------

    def _better_form(self, request: RoutedRequest, pair: Place, colocated: Place, needed_tokens: int) -> Place:
        """The form with the least work on its first instance, queued work plus the request's own; with equal work the
        one with the lower decode load. A form that has failed the request loses against one that has not, and one
        without memory to decode it now against one with memory."""
        query = DecodeQuery(
            request.num_tokens,
            request.growth_tokens,
            needed_tokens,
            pair.instance.status.fingerprint,
            request.avoid,
            self.failures.incompatible_readers(pair.instance.instance_id),
        )
        decode = self._decodes.best(query)
        if decode is None:  # those that could hold it cannot read that KV
            return colocated
        forms = [
            self._ranked_form(request, pair, self._decodes, decode.rank[3]),
            self._ranked_form(request, colocated, self._colocated, colocated.instance.instance_id),
        ]
        best, other = sorted(forms, key=lambda form: form[:5])
        chosen, loser = best.place, other.place
        if chosen.selection is None:
            return chosen
        reason = f"{'a pair' if loser is pair else 'colocated'}: {other.lost_to(best)}"
        candidate = Candidate(loser.instance.instance_id, None, (("work", other.work_tokens),), reason)
        return chosen._replace(
            selection=replace(chosen.selection, candidates=(*chosen.selection.candidates, candidate))
        )

    def _ranked_form(self, request: RoutedRequest, place: Place, index: DecodeIndex, decoding_id: str) -> "_Form":
        """`decoding_id`: the instance in `index` that would decode."""
        return _Form(
            has_failed=place.instance.instance_id in request.avoid,
            must_wait=self._must_wait(request, index, decoding_id),
            work_tokens=self._work_tokens(request, place.instance),
            decode_load=index.views[decoding_id].load,
            has_transfer=place.hand_over,
            place=place,
        )

    def _must_wait(self, request: RoutedRequest, index: DecodeIndex, instance_id: str) -> bool:
        """Whether the request would wait for memory to decode there, because too little is free or others wait."""
        view = index.views[instance_id]
        has_waiting = self.instances[instance_id].status.unreserved_tokens > 0
        return has_waiting or view.must_wait(request.num_tokens, request.growth_tokens)

    def _work_tokens(self, request: RoutedRequest, instance: KnownInstance) -> int:
        return instance.queued_tokens + request.num_tokens - self.prefixes.tokens(request, instance)

    # --- the decode instance of a pair -------------------------------------------------------------------------------

    def choose_decode(self, attempt: Attempt, prefill: KnownInstance, now_s: float) -> Place | None:
        """A decode instance that can read the KV of `prefill`, and holds prompt and answer if any does."""
        return self._find(self._decodes, self._decode_query(attempt, prefill, now_s), hand_over=False)

    def choose_other_decode(self, attempt: Attempt, prefill: KnownInstance, now_s: float) -> Place | None:
        """As `choose_decode`, after a link or the decode instance has failed. None if all other links are suspect, too,
        or if the instance cannot hold the answer: another attempt may find one that can."""
        place = self.choose_decode(attempt, prefill, now_s)
        if place is None or place.instance.capacity_tokens < attempt.num_tokens + attempt.growth_tokens:
            return None
        suspects = self.failures.suspect_readers(prefill, self.instances)
        return None if place.instance.instance_id in suspects else place

    def _decode_query(self, attempt: Attempt, prefill: KnownInstance, now_s: float) -> DecodeQuery:
        fingerprint = prefill.status.fingerprint
        needed_tokens = attempt.num_tokens + attempt.growth_tokens
        if fingerprint not in self._decodes.fingerprints_for(needed_tokens):
            needed_tokens = attempt.num_tokens + 1
        refused = self.failures.incompatible_readers(prefill.instance_id)
        failures: Mapping[str, float] = NO_FAILURES
        if self.failures:
            failures = self.failures.of_decodes(self.failures.current(now_s), prefill.instance_id)
        query = DecodeQuery(
            attempt.num_tokens,
            attempt.growth_tokens,
            needed_tokens,
            fingerprint,
            attempt.request.avoid,
            # A prefill instance that has become a decode instance does not read its own KV.
            {prefill.instance_id, *refused} if prefill.role is Role.DECODE else refused,
            failures,
        )
        suspects = self.failures.suspect_readers(prefill, self.instances) if self.failures else NO_INSTANCES
        others = query._replace(exclude=query.exclude | suspects)
        return others if suspects and self._decodes.best(others) is not None else query

    # --- events of attempts, for selectors that predict times --------------------------------------------------------

    def prediction_errors(self) -> Mapping[str, Residuals]:
        """Errors of predictions, by kind of time."""
        return {}

    def expected_tpot(self, request: RoutedRequest, now_s: float) -> tuple[float, float] | None:
        """The lowest predicted TPOT of the request on any instance, in seconds, and the probability that it meets the
        target. None: the request has no target, or nothing is known."""
        return None

    def begun(self, attempt: Attempt, place: Place, now_s: float) -> None:
        """The attempt was sent to its first instance."""

    def decode_chosen(self, attempt: Attempt, instance: KnownInstance, now_s: float) -> None:
        """The attempt was sent to the decode instance of its pair."""

    def first_token(self, attempt: Attempt, now_s: float) -> None:
        """The attempt's first token has arrived."""

    def transferred(self, attempt: Attempt, now_s: float) -> None:
        """The decode instance owns the attempt's KV."""

    def finished(self, attempt: Attempt, now_s: float) -> None:
        """All tokens of the attempt have arrived; its instances still hold it."""

    def released(self, attempt: Attempt, instance_id: str, now_s: float) -> None:
        """The attempt has ended at that instance."""
