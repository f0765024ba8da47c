"""Prefill instances in the order of their queues' lengths. See `scheduling.instance_index`."""

from collections.abc import Container, Mapping, Sequence, Set
from dataclasses import replace
from typing import NamedTuple

from tandem.scheduling.instance_index import NO_FAILURES, NO_INSTANCES, InstanceIndex
from tandem.scheduling.routing import PrefillView, Scored, Selection, choose_prefill, score_prefill
from tandem.scheduling.sorted_by_load import Entry, SortedByLoad

Holders = Sequence[tuple[int, Set[str]]]  # as `PrefixTracker.holders` gives them


class PrefillQuery(NamedTuple):
    """A prompt for which an instance is selected; see `routing.choose_prefill` and `scheduling.instance_index`.

    `holders` are the instances that have leading tokens of the prompt cached, most tokens first.
    """

    num_tokens: int
    needed_tokens: int
    decode_fingerprints: Container[str]
    holders: Holders = ()
    avoid: Set[str] = NO_INSTANCES
    exclude: Set[str] = NO_INSTANCES
    failures: Mapping[str, float] = NO_FAILURES


class PrefillIndex(InstanceIndex[PrefillView, PrefillQuery]):
    """`routing.choose_prefill` defines the policy."""

    __slots__ = ("_orders", "_slack_tokens")

    def __init__(self, slack_tokens: int) -> None:
        super().__init__()
        self._slack_tokens = slack_tokens
        self._orders: dict[int, SortedByLoad] = {}  # ready instances, by max_model_len; none is empty

    def put(self, view: PrefillView) -> None:
        """As in the base class. `cached_prefix_tokens` of the view is ignored: queries have it."""
        known = self.views.get(view.instance_id)
        if known is not None and (known.max_model_len != view.max_model_len or not view.ready):
            self._leave_order(known)
        self.views[view.instance_id] = view
        if view.ready:
            order = self._orders.get(view.max_model_len)
            if order is None:
                order = self._orders[view.max_model_len] = SortedByLoad()
            order.put(view.instance_id, view.queued_tokens, self._turn(view.instance_id))

    def remove(self, instance_id: str) -> None:
        """Remove the instance; no effect if it is unknown."""
        view = self._forget(instance_id)
        if view is not None:
            self._leave_order(view)

    def _leave_order(self, view: PrefillView) -> None:
        order = self._orders.get(view.max_model_len)
        if order is not None:
            order.discard(view.instance_id)
            if not len(order):
                del self._orders[view.max_model_len]

    def _compare_all(self, query: PrefillQuery) -> Selection:
        return choose_prefill(
            [view for view in self.views.values() if view.instance_id not in query.exclude],
            num_tokens=query.num_tokens,
            needed_tokens=query.needed_tokens,
            decode_fingerprints=query.decode_fingerprints,
            slack_tokens=self._slack_tokens,
            failures=query.failures,
            last_chosen=self.last_chosen,
        )

    def _best_of(self, query: PrefillQuery, count: int) -> list[Scored]:
        """Instances with recent failures are few, and are compared one by one."""
        skip = {*query.avoid, *query.exclude}
        shortest = self._first_where(query, skip, None)
        if shortest is None and query.avoid:
            skip = set(query.exclude)
            shortest = self._first_where(query, skip, None)
        if shortest is None:
            return []
        shortest_tokens = int(shortest[0])
        if not query.holders and not query.failures and count == 1:
            return [self._score(shortest[2], query, shortest_tokens)]
        usable = [instance_id for instance_id in query.failures if self._is_usable(instance_id, query, skip)]
        failed = sorted((self._score(each, query, shortest_tokens) for each in usable), key=lambda each: each.rank)
        skip.update(usable)

        def winner() -> Scored | None:
            found = self._winner(query, skip, shortest_tokens)
            return None if found is None else self._score(found, query, shortest_tokens)

        return self._merge(failed, skip, winner, count)

    def _score(self, instance_id: str, query: PrefillQuery, shortest_tokens: int) -> Scored:
        view = self.views[instance_id]
        cached_tokens = next((tokens for tokens, holders in query.holders if instance_id in holders), 0)
        return score_prefill(
            replace(view, cached_prefix_tokens=cached_tokens) if cached_tokens else view,
            num_tokens=query.num_tokens,
            shortest_tokens=shortest_tokens,
            slack_tokens=self._slack_tokens,
            failures=query.failures.get(instance_id, 0.0),
            last_chosen=self._turn(instance_id),
        )

    def _winner(self, query: PrefillQuery, skip: Set[str], shortest_tokens: float) -> str | None:
        """The best instance has the shortest queue among those with equally long cached prefixes, so that one instance
        is compared for each length of a cached prefix."""
        best = self._first_where(query, skip, None)
        if best is None:
            return None
        for cached_tokens, holders in query.holders:
            credit = min(cached_tokens, query.num_tokens - 1)
            if shortest_tokens - credit > best[0]:
                break  # shorter prefixes cannot win either, not even with the shortest queue
            found = self._shortest_among(holders, query, skip)
            if found is not None and found[0] <= shortest_tokens + self._slack_tokens:
                best = min(best, (found[0] - credit, found[1], found[2]))
        return best[2]

    def _shortest_among(self, holders: Set[str], query: PrefillQuery, skip: Set[str]) -> Entry | None:
        """Few holders are compared one by one; if there are many, one of them is found soon in the order of queues."""
        if len(holders) ** 2 > len(self.views):
            return self._first_where(query, skip, holders)
        entries = (
            self._orders[self.views[instance_id].max_model_len].entry(instance_id)
            for instance_id in holders
            if self._is_usable(instance_id, query, skip)
        )
        return min(entries, default=None)

    def _first_where(self, query: PrefillQuery, skip: Set[str], among: Set[str] | None) -> Entry | None:
        """The shortest queue among the instances that can take the prompt, and are in `among` if that is given."""
        best: Entry | None = None
        for max_model_len, order in self._orders.items():
            if query.needed_tokens > max_model_len:
                continue
            for entry in order:
                if best is not None and best < entry:
                    break
                if among is not None and entry[2] not in among:
                    continue
                if entry[2] not in skip and self.views[entry[2]].fingerprint in query.decode_fingerprints:
                    best = entry
                    break
        return best

    def _is_usable(self, instance_id: str, query: PrefillQuery, skip: Set[str]) -> bool:
        view = self.views.get(instance_id)
        if view is None or not view.ready or instance_id in skip:
            return False
        return query.needed_tokens <= view.max_model_len and view.fingerprint in query.decode_fingerprints
