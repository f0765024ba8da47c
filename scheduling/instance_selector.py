"""Selects the instances of an attempt among those that are usable now. The cost hardly depends on their number.

A request runs on a pair (a prefill instance, then a decode instance that reads its KV) or on one colocated instance.
Where both forms are there, it takes the one with the least work before its first token. While there is neither (no
prefill instance, or none whose KV a decode instance can read, as in the middle of a rolling update), a decode instance
computes the prompt itself: degraded service instead of none.
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
    """An instance for an attempt. `hand_over`: it computes the prompt only. `selection`: where decisions are
    explained. `expected`: the predicted TTFT from now and TPOT, in seconds, of a selector that predicts."""

    instance: KnownInstance
    hand_over: bool
    selection: Selection | None
    expected: tuple[float, float] | None = None


class _Form(NamedTuple):
    """A pair or a colocated instance, as they are compared: the least of the first five fields wins."""

    has_failed: bool
    must_wait: bool
    work_tokens: int
    decode_load: float
    has_transfer: bool
    place: Place

    def lost_to(self, best: "_Form") -> str:
        """Why, in words."""
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
    """Owns the instances as known, what they have cached, which of them failed lately, and how long requests may be."""

    def __init__(
        self, settings: RoutingSettings, *, explain: bool = True, tracker_type: type[PrefixTracker] = PrefixTracker
    ) -> None:
        """`explain`: give the comparison behind each decision. `tracker_type`: for names of blocks other than
        hashes."""
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
        """It is new, or has reported."""
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
        """KV slots that it will probably need to decode: none if it ends with its first token."""
        if attempt.growth_tokens <= 1:
            return 0
        return attempt.num_tokens + self.answer_lengths.expected_tokens(attempt.growth_tokens)

    def leave_role(self, instance: KnownInstance) -> None:
        """The instance is no candidate in its present role any more."""
        self._credit.leave_role(instance.instance_id)
        index: PrefillIndex | DecodeIndex = self._prefills
        if instance.role is not Role.PREFILL:
            index = self._decodes if instance.role is Role.DECODE else self._colocated
        index.remove(instance.instance_id)

    def remove(self, instance_id: str) -> None:
        """It is gone for good."""
        self.leave_role(self.instances.pop(instance_id))
        self._credit.remove(instance_id)
        self.failures.forget(instance_id)
        self.prefixes.forget(instance_id)

    def refuse_pair(self, prefill_id: str, decode_id: str) -> None:
        """The two have met and cannot exchange KV: they are not chosen together again."""
        self.failures.refuse(prefill_id, decode_id)
        self.length.changed()

    def waits_for_credit(self, request: RoutedRequest) -> bool:
        """Of a request for which nothing was chosen: whether an instance was usable."""
        return self._credit.is_limited and request.num_tokens < self.length.tokens

    # --- the first instance ------------------------------------------------------------------------------------------

    def choose_first(self, request: RoutedRequest, now_s: float) -> Place | None:
        """Where an attempt can begin: where prompt and answer fit, or as much of them as fits anywhere. Instances that
        have failed the request are a last resort. None: nothing is usable, or what is has no credit."""
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
        excluded = query.exclude | without_credit if query.exclude else without_credit
        return self._find(self._prefills, query._replace(exclude=excluded), hand_over=True)

    def _prefill_query(self, request: RoutedRequest, needed_tokens: int, failures: Mapping[str, float]) -> PrefillQuery:
        """Whether the instances have credit or not. Without those whose links are suspect, where there is another."""
        if self.failures:
            failures = self.failures.of_prefills(failures, self.instances)
        query = PrefillQuery(
            request.num_tokens,
            needed_tokens,
            self._credit.with_room(self._decodes.fingerprints_for(needed_tokens)),
            self.prefixes.holders(request),
            request.avoid,
            self.failures.without_reader(self.instances),
            failures,
        )
        cut_off = self.failures.cut_off(self.instances) if self.failures else NO_INSTANCES
        others = query._replace(exclude=query.exclude | cut_off)
        return others if cut_off and self._prefills.best(others) is not None else query

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
        """The form with the least work, queued and of the request, on its first instance; of equals the one whose
        decoding is less loaded. A form that has no memory to decode it now is passed over if the other one has, and one
        that failed it if the other did not."""
        query = DecodeQuery(
            request.num_tokens,
            request.growth_tokens,
            needed_tokens,
            pair.instance.status.fingerprint,
            request.avoid,
            self.failures.refused_by(pair.instance.instance_id),
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
        """`decoding_id`: the instance of `index` that would decode."""
        return _Form(
            has_failed=place.instance.instance_id in request.avoid,
            must_wait=self._must_wait(request, index, decoding_id),
            work_tokens=self._work_tokens(request, place.instance),
            decode_load=index.views[decoding_id].load,
            has_transfer=place.hand_over,
            place=place,
        )

    def _must_wait(self, request: RoutedRequest, index: DecodeIndex, instance_id: str) -> bool:
        """No memory is left for it, or others wait there for a place already."""
        view = index.views[instance_id]
        has_waiting = self.instances[instance_id].status.unreserved_tokens > 0
        return has_waiting or view.must_wait(request.num_tokens, request.growth_tokens)

    def _work_tokens(self, request: RoutedRequest, instance: KnownInstance) -> int:
        return instance.queued_tokens + request.num_tokens - self.prefixes.tokens(request, instance)

    # --- the decode instance of a pair -------------------------------------------------------------------------------

    def choose_decode(self, attempt: Attempt, prefill: KnownInstance, now_s: float) -> Place | None:
        """One that can read the KV of `prefill`, and hold prompt and answer if one can."""
        return self._find(self._decodes, self._decode_query(attempt, prefill, now_s), hand_over=False)

    def choose_other_decode(self, attempt: Attempt, prefill: KnownInstance, now_s: float) -> Place | None:
        """As `choose_decode`, after a link has failed, or the decode instance. None if every other link is suspect,
        too, or the answer does not fit there: another attempt may find more room."""
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
        refused = self.failures.refused_by(prefill.instance_id)
        failures: Mapping[str, float] = NO_FAILURES
        if self.failures:
            failures = self.failures.of_decodes(self.failures.current(now_s), prefill.instance_id)
        query = DecodeQuery(
            attempt.num_tokens,
            attempt.growth_tokens,
            needed_tokens,
            fingerprint,
            attempt.request.avoid,
            # One that was a prefill instance before does not read its own KV.
            {prefill.instance_id, *refused} if prefill.role is Role.DECODE else refused,
            failures,
        )
        suspects = self.failures.suspect_readers(prefill, self.instances) if self.failures else NO_INSTANCES
        others = query._replace(exclude=query.exclude | suspects)
        return others if suspects and self._decodes.best(others) is not None else query

    # --- what happens to attempts: of interest to selectors that predict ---------------------------------------------

    def prediction_errors(self) -> Mapping[str, Residuals]:
        """By the kind of time."""
        return {}

    def expected_tpot(self, request: RoutedRequest, now_s: float) -> tuple[float, float] | None:
        """Its TPOT in seconds on the instance where that is best, and the probability that it meets the target. None:
        there is no target, or nothing is known."""
        return None

    def begun(self, attempt: Attempt, place: Place, now_s: float) -> None:
        """It was sent to its first instance."""

    def decode_chosen(self, attempt: Attempt, instance: KnownInstance, now_s: float) -> None:
        """And to the instance that reads its KV."""

    def first_token(self, attempt: Attempt, now_s: float) -> None: ...

    def transferred(self, attempt: Attempt, now_s: float) -> None:
        """Its KV is where it decodes."""

    def finished(self, attempt: Attempt, now_s: float) -> None:
        """All its tokens are there; nothing is released yet."""

    def released(self, attempt: Attempt, instance_id: str, now_s: float) -> None:
        """Nothing of it is at the instance any more."""
