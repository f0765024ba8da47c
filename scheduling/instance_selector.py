"""Selects the instances of an attempt among those that are usable now. The cost hardly depends on their number.

A request runs on a pair (a prefill instance, then a decode instance that reads its KV) or on one colocated instance.
Where both forms are there, it takes the one with the least work before its first token. While there is neither (no
prefill instance, or none whose KV a decode instance can read, as in the middle of a rolling update), a decode instance
computes the prompt itself: degraded service instead of none.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from tandem.core.errors import ContextLengthError, UnavailableError
from tandem.core.session import Role
from tandem.scheduling.answer_lengths import AnswerLengths
from tandem.scheduling.decode_index import DecodeIndex, DecodeQuery
from tandem.scheduling.instance_credit import InstanceCredit
from tandem.scheduling.instance_index import NO_FAILURES, NO_INSTANCES, InstanceIndex, QueryT
from tandem.scheduling.known_instance import KnownInstance
from tandem.scheduling.predictor import Residuals
from tandem.scheduling.prefill_index import Holders, PrefillIndex, PrefillQuery
from tandem.scheduling.prefix_tracker import PrefixTracker
from tandem.scheduling.recent_failures import RecentFailures
from tandem.scheduling.routed_request import Attempt, RoutedRequest
from tandem.scheduling.routing import Candidate, Selection
from tandem.scheduling.routing_settings import RoutingSettings


class Place(NamedTuple):
    """An instance for an attempt. `hand_over`: it computes the prompt only. `selection`: where decisions are
    explained. `expected`: the predicted TTFT from now and TPOT, in seconds, of a selector that predicts."""

    instance: KnownInstance
    hand_over: bool
    selection: Selection | None
    expected: tuple[float, float] | None = None


class InstanceSelector:
    """Owns the instances as known, what they have cached, and which of them failed lately."""

    def __init__(
        self, settings: RoutingSettings, *, explain: bool = True, tracker_type: type[PrefixTracker] = PrefixTracker
    ) -> None:
        """`explain`: give the comparison behind each decision. `tracker_type`: for names of blocks other than
        hashes."""
        self.instances: dict[str, KnownInstance] = {}  # to be read only
        self.failures = RecentFailures()
        self._settings = settings
        self._explain = explain
        self._tracker_type = tracker_type
        self._prefills = PrefillIndex(settings.slack_tokens)
        self._decodes = DecodeIndex()
        self._colocated = DecodeIndex()
        self._trackers: dict[int, PrefixTracker] = {}  # by block size: it determines the blocks' names
        self._credit = InstanceCredit(settings)
        self.answer_lengths = AnswerLengths()
        self._capacity_tokens: int | None = None  # None: to be worked out
        self._is_local = False  # decode instances must compute prompts, for want of others

    # --- instances ---------------------------------------------------------------------------------------------------

    def update(self, instance: KnownInstance) -> None:
        """It is new, or has reported."""
        self.instances[instance.instance_id] = instance
        block_size = instance.status.block_size
        if instance.role is not Role.DECODE and block_size not in self._trackers:
            self._trackers[block_size] = self._tracker_type(block_size, self._settings.max_tracked_blocks)
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
        for tracker in self._trackers.values():
            tracker.forget(instance_id)

    def offers_changed(self) -> None:
        """Which instances are usable, or what they can hold."""
        self._capacity_tokens = None

    def refuse_pair(self, prefill_id: str, decode_id: str) -> None:
        """The two have met and cannot exchange KV: they are not chosen together again."""
        self.failures.refuse(prefill_id, decode_id)
        self.offers_changed()

    # --- capacity ----------------------------------------------------------------------------------------------------

    def capacity_tokens(self) -> int:
        """Longest prompt plus answer that a usable instance or pair can hold; 0 without one."""
        if self._capacity_tokens is None:
            self._capacity_tokens = self._find_capacity_tokens()
        return self._capacity_tokens

    def require_capacity_tokens(self) -> int:
        """As `capacity_tokens`. Raises UnavailableError, which says what is missing, instead of 0."""
        if capacity_tokens := self.capacity_tokens():
            return capacity_tokens
        usable = {instance.role for instance in self.instances.values() if instance.is_usable}
        for role in (Role.PREFILL, Role.DECODE):
            if role not in usable:
                raise UnavailableError(f"no {role.value} worker is ready")
        raise UnavailableError("no prefill worker is ready whose KV a ready decode worker can read")

    def check_length(self, num_tokens: int) -> None:
        """Raises ContextLengthError if nothing usable holds a prompt that long and a token of answer."""
        capacity_tokens = self.require_capacity_tokens()
        if num_tokens >= capacity_tokens:
            raise ContextLengthError(
                f"the prompt has {num_tokens} tokens; the workers that are up hold at most {capacity_tokens} tokens of "
                "prompt and answer"
            )

    def waits_for_credit(self, request: RoutedRequest) -> bool:
        """Of a request for which nothing was chosen: whether an instance was usable."""
        return self._credit.is_limited and request.num_tokens < self.capacity_tokens()

    def _find_capacity_tokens(self) -> int:
        longest: dict[Role, dict[str, int]] = {role: {} for role in Role}  # by fingerprint
        without_reader = self.failures.without_reader(self.instances)
        for instance in self.instances.values():
            if instance.is_usable and instance.instance_id not in without_reader:
                found, fingerprint = longest[instance.role], instance.status.fingerprint
                found[fingerprint] = max(instance.capacity_tokens, found.get(fingerprint, 0))
        prefills, decodes = longest[Role.PREFILL], longest[Role.DECODE]
        pairs = (min(prefills[each], decodes[each]) for each in prefills.keys() & decodes.keys())
        capacity_tokens = max((*pairs, *longest[Role.COLOCATED].values()), default=0)
        self._is_local = capacity_tokens == 0 and self._settings.local_prefill
        return max(decodes.values(), default=0) if self._is_local else capacity_tokens

    # --- the first instance ------------------------------------------------------------------------------------------

    def choose_first(self, request: RoutedRequest, now_s: float) -> Place | None:
        """Where an attempt can begin: where prompt and answer fit, or as much of them as fits anywhere. Instances that
        have failed the request are a last resort. None: nothing is usable, or what is has no credit."""
        capacity_tokens = self.capacity_tokens()
        needed_tokens = min(request.max_total_tokens, capacity_tokens)
        if request.num_tokens >= capacity_tokens:
            return None
        failures: Mapping[str, float] = self.failures.current(now_s) if self.failures else NO_FAILURES
        if self._is_local:
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

    def record_prefix(self, request: RoutedRequest, instance: KnownInstance) -> None:
        """The instance computes the prompt, and may keep it."""
        if request.has_block_names and instance.role is not Role.DECODE:
            block_size, num_blocks = instance.status.block_size, instance.status.blocks.total
            self._trackers[block_size].record(instance.instance_id, request.block_names(block_size), num_blocks)

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
            self._holders(request) if request.has_block_names else (),
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

    def _holders(self, request: RoutedRequest) -> Holders:
        holders = [
            found for size, tracker in self._trackers.items() for found in tracker.holders(request.block_names(size))
        ]
        if len(self._trackers) > 1:
            holders.sort(key=lambda found: found[0], reverse=True)
        return holders

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
        forms = ((pair, self._decodes, decode.rank[3]), (colocated, self._colocated, colocated.instance.instance_id))
        ranked = [
            (
                place.instance.instance_id in request.avoid,
                self._must_wait(request, index, decoding_id),
                self._work_tokens(request, place.instance),
                index.views[decoding_id].load,
                place.hand_over,  # of equals the one without a transfer
                place,
            )
            for place, index, decoding_id in forms
        ]
        best, other = sorted(ranked, key=lambda rank: rank[:5])
        chosen, loser = best[5], other[5]
        if chosen.selection is None:
            return chosen
        if other[0] is not best[0]:
            reason = "it failed the request"
        elif other[1] is not best[1]:
            reason = "no memory to decode there"
        elif other[2] > best[2]:
            reason = f"{other[2] - best[2]} tokens more to compute before the first token"
        elif other[3] > best[3]:
            reason = f"as much to compute before the first token, decoding more loaded by {other[3] - best[3]:g}"
        else:
            reason = "equal, but for a transfer of KV"
        form = "a pair" if loser is pair else "colocated"
        candidate = Candidate(loser.instance.instance_id, None, (("work", other[2]),), f"{form}: {reason}")
        return chosen._replace(
            selection=replace(chosen.selection, candidates=(*chosen.selection.candidates, candidate))
        )

    def _must_wait(self, request: RoutedRequest, index: DecodeIndex, instance_id: str) -> bool:
        """No memory is left for it, or others wait there for a place already."""
        view = index.views[instance_id]
        has_waiting = self.instances[instance_id].status.unreserved_tokens > 0
        return has_waiting or view.must_wait(request.num_tokens, request.growth_tokens)

    def _work_tokens(self, request: RoutedRequest, instance: KnownInstance) -> int:
        return instance.queued_tokens + request.num_tokens - self.cached_tokens(request, instance)

    def cached_tokens(self, request: RoutedRequest, instance: KnownInstance) -> int:
        """Of the prompt, that the instance need not compute as far as is known."""
        block_size = instance.status.block_size
        tracker, names = self._trackers.get(block_size), request.block_names(block_size)
        if tracker is None or not names:
            return 0
        return min(tracker.matched_tokens(instance.instance_id, names), request.num_tokens - 1)

    # --- the decode instance of a pair -------------------------------------------------------------------------------

    def choose_decode(self, attempt: Attempt, prefill: KnownInstance, now_s: float) -> Place | None:
        """One that can read the KV of `prefill`, and hold prompt and answer if one can."""
        return self._find(self._decodes, self._decode_query(attempt, prefill, now_s), hand_over=False)

    def choose_other_decode(self, attempt: Attempt, prefill: KnownInstance, now_s: float) -> Place | None:
        """As `choose_decode`, after a link has failed. None if every other link is suspect, too."""
        place = self.choose_decode(attempt, prefill, now_s)
        suspects = self.failures.suspect_readers(prefill, self.instances)
        return None if place is None or place.instance.instance_id in suspects else place

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
