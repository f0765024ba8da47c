"""Decode and colocated instances in the order of memory in use and batch size. See `scheduling.instance_index`."""

from collections.abc import Container, Iterable, Mapping, Set
from itertools import chain, islice
from typing import NamedTuple

from tandem.scheduling.instance_index import NO_FAILURES, NO_INSTANCES, InstanceIndex
from tandem.scheduling.routing import DecodeView, Scored, Selection, choose_decode, score_decode
from tandem.scheduling.sorted_by_load import SortedByLoad


class DecodeQuery(NamedTuple):
    """A sequence for which an instance is selected; see `routing.choose_decode` and `scheduling.instance_index`."""

    num_tokens: int
    growth_tokens: int
    needed_tokens: int
    fingerprint: str | None
    avoid: Set[str] = NO_INSTANCES
    exclude: Set[str] = NO_INSTANCES
    failures: Mapping[str, float] = NO_FAILURES


class _Group:
    """Instances that differ only in their load: the order among them is the same for every request."""

    __slots__ = ("by_claim", "by_load")

    def __init__(self) -> None:
        self.by_load = SortedByLoad()
        self.by_claim = SortedByLoad()  # load: claimed tokens

    def put(self, view: DecodeView, turn: int) -> None:
        self.by_load.put(view.instance_id, view.load, turn)
        self.by_claim.put(view.instance_id, view.claimed_tokens, 0)

    def discard(self, instance_id: str) -> None:
        self.by_load.discard(instance_id)
        self.by_claim.discard(instance_id)

    def first(self, skip: Set[str]) -> str | None:
        """The instance with the least load."""
        for entry in self.by_load:
            if entry[2] not in skip:
                return entry[2]
        return None

    def first_within(self, claimed_tokens: int, skip: Set[str]) -> str | None:
        """The instance with the least load among those with at most `claimed_tokens`. Few such instances are compared
        one by one; if there are many, one of them is found soon in the order of load."""
        count = self.by_claim.up_to(claimed_tokens)
        if count**2 > len(self.by_claim):
            for _, _, instance_id in self.by_load:
                if instance_id not in skip and self.by_claim.entry(instance_id)[0] <= claimed_tokens:
                    return instance_id
            return None
        within = (entry[2] for entry in islice(self.by_claim, count) if entry[2] not in skip)
        entries = [self.by_load.entry(instance_id) for instance_id in within]
        return min(entries)[2] if entries else None


class DecodeIndex(InstanceIndex[DecodeView, DecodeQuery]):
    """`routing.choose_decode` defines the policy."""

    __slots__ = ("_groups",)

    def __init__(self) -> None:
        super().__init__()
        # Ready instances: fingerprint -> (max_model_len, capacity in tokens) -> group.
        self._groups: dict[str, dict[tuple[int, int], _Group]] = {}

    def put(self, view: DecodeView) -> None:
        known = self.views.get(view.instance_id)
        if known is not None and (not view.ready or _kind(known) != _kind(view)):
            self._leave_group(known)
        self.views[view.instance_id] = view
        if view.ready:
            groups = self._groups.setdefault(view.fingerprint, {})
            group = groups.get((view.max_model_len, view.capacity_tokens))
            if group is None:
                group = groups[view.max_model_len, view.capacity_tokens] = _Group()
            group.put(view, self._turn(view.instance_id))

    def remove(self, instance_id: str) -> None:
        """Remove the instance; no effect if it is unknown."""
        view = self._forget(instance_id)
        if view is not None:
            self._leave_group(view)

    def fingerprints_for(self, needed_tokens: int) -> Container[str]:
        """Fingerprints of the ready instances that hold a prompt and answer of that length. Valid until the next change
        of the index."""
        return _Fingerprints(self._groups, needed_tokens)

    def _compare_all(self, query: DecodeQuery) -> Selection:
        return choose_decode(
            [view for view in self.views.values() if view.instance_id not in query.exclude],
            num_tokens=query.num_tokens,
            growth_tokens=query.growth_tokens,
            needed_tokens=query.needed_tokens,
            fingerprint=query.fingerprint,
            failures=query.failures,
            last_chosen=self.last_chosen,
        )

    def _best_of(self, query: DecodeQuery, count: int) -> list[Scored]:
        best = self._best_without({*query.avoid, *query.exclude}, query, count)
        return best if best or not query.avoid else self._best_without(set(query.exclude), query, count)

    def _best_without(self, skip: set[str], query: DecodeQuery, count: int) -> list[Scored]:
        failed: list[Scored] = []
        if query.failures:
            usable = [instance_id for instance_id in query.failures if self._is_usable(instance_id, query, skip)]
            failed = sorted((self._score(each, query) for each in usable), key=lambda each: each.rank)
            skip.update(usable)
        return self._merge(failed, skip, lambda: self._winner(query, skip), count)

    def _winner(self, query: DecodeQuery, skip: Set[str]) -> Scored | None:
        """The best of each group is the instance with the least load or, if a request would wait there for memory,
        perhaps the one with the least load that has enough memory."""
        best: Scored | None = None
        for (max_model_len, capacity_tokens), group in self._groups_of(query.fingerprint):
            if query.needed_tokens > max_model_len:
                continue
            max_claimed = capacity_tokens - min(query.num_tokens + query.growth_tokens, max_model_len)
            first = group.first(skip)
            if first is None:
                continue
            scored = self._score(first, query)
            if best is None or scored.rank < best.rank:
                best = scored
            if self.views[first].claimed_tokens > max_claimed:
                fitting = group.first_within(max_claimed, skip)
                if fitting is not None:
                    best = min(best, self._score(fitting, query), key=lambda each: each.rank)
        return best

    def _score(self, instance_id: str, query: DecodeQuery) -> Scored:
        return score_decode(
            self.views[instance_id],
            num_tokens=query.num_tokens,
            growth_tokens=query.growth_tokens,
            failures=query.failures.get(instance_id, 0.0),
            last_chosen=self._turn(instance_id),
        )

    def _is_usable(self, instance_id: str, query: DecodeQuery, skip: Set[str]) -> bool:
        view = self.views.get(instance_id)
        if view is None or not view.ready or instance_id in skip:
            return False
        is_compatible = query.fingerprint is None or view.fingerprint == query.fingerprint
        return is_compatible and query.needed_tokens <= view.max_model_len

    def _groups_of(self, fingerprint: str | None) -> Iterable[tuple[tuple[int, int], _Group]]:
        if fingerprint is not None:
            return self._groups.get(fingerprint, {}).items()
        return chain.from_iterable(groups.items() for groups in self._groups.values())

    def _leave_group(self, view: DecodeView) -> None:
        groups = self._groups.get(view.fingerprint, {})
        group = groups.get((view.max_model_len, view.capacity_tokens))
        if group is not None:
            group.discard(view.instance_id)
            if not len(group.by_load):
                del groups[view.max_model_len, view.capacity_tokens]
                if not groups:
                    del self._groups[view.fingerprint]


def _kind(view: DecodeView) -> tuple[str, int, int]:
    return view.fingerprint, view.max_model_len, view.capacity_tokens


class _Fingerprints:
    """A set of fingerprints, computed on demand: those of groups whose instances can hold `needed_tokens`."""

    __slots__ = ("_groups", "_needed_tokens")

    def __init__(self, groups: dict[str, dict[tuple[int, int], _Group]], needed_tokens: int) -> None:
        self._groups = groups
        self._needed_tokens = needed_tokens

    def __contains__(self, fingerprint: object) -> bool:
        groups = self._groups.get(fingerprint)  # type: ignore[call-overload]
        return bool(groups) and max(groups)[0] >= self._needed_tokens
