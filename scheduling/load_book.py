"""What a router knows of thousands of instances, kept in order, so that a choice need not compare them all.

Both books give exactly the winner of `scheduling.routing`'s full comparison, at the price of a few look-ups:

    book.put(view)       an instance is there, or its load has changed
    book.remove(id)      it is gone
    book.pick(...)       the winner's id, None if no instance can take the request
    book.peek(...)       the winner with its score, which is not chosen by that
    book.choose(...)     the same as a `Choice`: with the comparison to the next few, or why there is none

A pick counts as chosen: among equals it is another's turn next. Instances in `avoid` are a last resort.
Where KV may move inside a node only, let the fingerprints name the node, too.
"""

from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Set
from dataclasses import dataclass, replace
from itertools import islice
from typing import Generic, TypeVar

from scheduling.load_order import Entry, LoadOrder
from scheduling.routing import (
    Choice,
    DecodeView,
    PrefillView,
    Scored,
    choice_of,
    choose_decode,
    choose_prefill,
    score_decode,
    score_prefill,
)

Holders = Iterable[tuple[int, Set[str]]]  # as `PrefixTracker.holders` gives them

NOBODY: frozenset[str] = frozenset()
_SHOWN = 3  # candidates of a choice that are written down

ViewT = TypeVar("ViewT", PrefillView, DecodeView)


class _Book(ABC, Generic[ViewT]):
    """The views, and which choice took each instance last."""

    __slots__ = ("_num_choices", "last_chosen", "views")

    def __init__(self) -> None:
        self.views: dict[str, ViewT] = {}  # to be read only
        self.last_chosen: dict[str, int] = {}  # to be read only
        self._num_choices = 0

    def __len__(self) -> int:
        return len(self.views)

    @abstractmethod
    def put(self, view: ViewT) -> None:
        """Enter an instance, or what has changed of it."""

    def _turn(self, instance_id: str) -> int:
        return self.last_chosen.get(instance_id, 0)

    def _take(self, instance_id: str) -> str:
        """It is chosen."""
        self._num_choices += 1
        self.last_chosen[instance_id] = self._num_choices
        self.put(self.views[instance_id])
        return instance_id

    def _forget(self, instance_id: str) -> ViewT | None:
        self.last_chosen.pop(instance_id, None)
        return self.views.pop(instance_id, None)


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A request to choose a prefill instance for. `holders`: most tokens first."""

    num_tokens: int
    decode_fingerprints: Container[str]
    holders: tuple[tuple[int, Set[str]], ...]


class PrefillBook(_Book[PrefillView]):
    """Prefill instances by the length of their queues. See `routing.choose_prefill` for the policy."""

    __slots__ = ("_orders", "_slack_tokens")

    def __init__(self, slack_tokens: int) -> None:
        super().__init__()
        self._slack_tokens = slack_tokens
        self._orders: dict[int, LoadOrder] = {}  # by max_model_len; of those that are ready

    def put(self, view: PrefillView) -> None:
        """As in the base; `cached_prefix_tokens` is of no account."""
        known = self.views.get(view.instance_id)
        if known is not None and (known.max_model_len != view.max_model_len or not view.ready):
            self._orders[known.max_model_len].discard(view.instance_id)
        self.views[view.instance_id] = view
        order = self._orders.setdefault(view.max_model_len, LoadOrder())
        if view.ready:
            order.put(view.instance_id, view.queued_tokens, self._turn(view.instance_id))

    def remove(self, instance_id: str) -> None:
        """Forget it; nothing happens if it is unknown."""
        view = self._forget(instance_id)
        if view is not None:
            self._orders[view.max_model_len].discard(instance_id)

    def pick(
        self, *, num_tokens: int, decode_fingerprints: Container[str], holders: Holders = (), avoid: Set[str] = NOBODY
    ) -> str | None:
        """`holders` are the instances that have leading tokens of the prompt cached."""
        best = self._best_of(_Prompt(num_tokens, decode_fingerprints, tuple(holders)), avoid, 1)
        return self._take(best[0].rank[3]) if best else None

    def peek(
        self, *, num_tokens: int, decode_fingerprints: Container[str], holders: Holders = (), avoid: Set[str] = NOBODY
    ) -> Scored | None:
        """What `pick` would choose. It does not count as chosen."""
        best = self._best_of(_Prompt(num_tokens, decode_fingerprints, tuple(holders)), avoid, 1)
        return best[0] if best else None

    def choose(
        self, *, num_tokens: int, decode_fingerprints: Container[str], holders: Holders = (), avoid: Set[str] = NOBODY
    ) -> Choice:
        """As `pick`, with the comparison."""
        best = self._best_of(_Prompt(num_tokens, decode_fingerprints, tuple(holders)), avoid, _SHOWN)
        if best:
            self._take(best[0].rank[3])
            return choice_of(best, {}, len(self) - len(best))
        return choose_prefill(  # nobody can: say why of each
            self.views.values(),
            num_tokens=num_tokens,
            decode_fingerprints=decode_fingerprints,
            slack_tokens=self._slack_tokens,
            last_chosen=self.last_chosen,
        )

    def _best_of(self, prompt: _Prompt, avoid: Set[str], count: int) -> list[Scored]:
        """The first `count` of the full comparison, or fewer if there are no more. Without `avoid`, unless only those
        are left."""
        skip = set(avoid)
        shortest = self._shortest(prompt, skip)
        if shortest is None and avoid:
            skip.clear()
            shortest = self._shortest(prompt, skip)
        best: list[Scored] = []
        while shortest is not None and len(best) < count and (winner := self._winner(prompt, skip, shortest[0])):
            view = self.views[winner]
            cached_tokens = next((tokens for tokens, holders in prompt.holders if winner in holders), 0)
            best.append(
                score_prefill(
                    replace(view, cached_prefix_tokens=cached_tokens) if cached_tokens else view,
                    num_tokens=prompt.num_tokens,
                    shortest_tokens=int(shortest[0]),
                    slack_tokens=self._slack_tokens,
                    last_chosen=self._turn(winner),
                )
            )
            skip.add(winner)
        return best

    def _winner(self, prompt: _Prompt, skip: Set[str], shortest_tokens: float) -> str | None:
        """Whoever wins has the shortest queue of all that have as much of the prompt cached, so one instance is looked
        at for each length of cached prefix."""
        best = self._shortest(prompt, skip)
        if best is None:
            return None
        for cached_tokens, holders in prompt.holders:
            credit = min(cached_tokens, prompt.num_tokens - 1)
            if shortest_tokens - credit > best[0]:
                break  # not even with the shortest queue
            found = self._shortest_among(holders, prompt, skip)
            if found is not None and found[0] <= shortest_tokens + self._slack_tokens:
                best = min(best, (found[0] - credit, found[1], found[2]))
        return best[2]

    def _shortest(self, prompt: _Prompt, skip: Set[str]) -> Entry | None:
        """The shortest queue of all that can take the prompt."""
        return self._first_where(prompt, skip, None)

    def _shortest_among(self, holders: Set[str], prompt: _Prompt, skip: Set[str]) -> Entry | None:
        """Few are looked at one by one; of many, one is soon met on the way from the shortest queue."""
        if len(holders) ** 2 > len(self.views):
            return self._first_where(prompt, skip, holders)
        entries = []
        for instance_id in holders:
            view = self.views.get(instance_id)
            if view is not None and prompt.num_tokens < view.max_model_len and self._can_take(view, prompt, skip):
                entry = self._orders[view.max_model_len].get(instance_id)
                if entry is not None:
                    entries.append(entry)
        return min(entries, default=None)

    def _first_where(self, prompt: _Prompt, skip: Set[str], among: Set[str] | None) -> Entry | None:
        best: Entry | None = None
        for max_model_len, order in self._orders.items():
            if prompt.num_tokens >= max_model_len:
                continue
            for entry in order:
                if best is not None and best < entry:
                    break
                if among is not None and entry[2] not in among:
                    continue
                if self._can_take(self.views[entry[2]], prompt, skip):
                    best = entry
                    break
        return best

    def _can_take(self, view: PrefillView, prompt: _Prompt, skip: Set[str]) -> bool:
        return view.instance_id not in skip and view.fingerprint in prompt.decode_fingerprints


class _Group:
    """Decode instances alike in all but their load: the order among them by load is the same for every request."""

    __slots__ = ("by_claim", "by_load")

    def __init__(self) -> None:
        self.by_load = LoadOrder()
        self.by_claim = LoadOrder()  # tokens

    def put(self, view: DecodeView, turn: int) -> None:
        self.by_load.put(view.instance_id, view.load, turn)
        self.by_claim.put(view.instance_id, view.claimed_tokens, 0)

    def discard(self, instance_id: str) -> None:
        self.by_load.discard(instance_id)
        self.by_claim.discard(instance_id)

    def first(self, skip: Set[str]) -> str | None:
        """The one with the least load."""
        return next((entry[2] for entry in self.by_load if entry[2] not in skip), None)

    def first_within(self, claimed_tokens: int, skip: Set[str]) -> str | None:
        """The one with the least load of all that claim no more memory than that. If those are few they are looked at
        one by one; of many, one is soon met on the way from the least load."""
        count = self.by_claim.up_to(claimed_tokens)
        if count**2 > len(self.by_claim):
            for _, _, instance_id in self.by_load:
                if instance_id not in skip and self._claim(instance_id) <= claimed_tokens:
                    return instance_id
            return None
        entries = [self.by_load.entry(it[2]) for it in islice(self.by_claim, count) if it[2] not in skip]
        return min(entries)[2] if entries else None

    def _claim(self, instance_id: str) -> float:
        return self.by_claim.entry(instance_id)[0]


class DecodeBook(_Book[DecodeView]):
    """Decode instances by memory and batch. See `routing.choose_decode` for the policy."""

    __slots__ = ("_groups",)

    def __init__(self) -> None:
        super().__init__()
        # Of those that are ready: fingerprint -> (max_model_len, capacity in tokens) -> the group.
        self._groups: dict[str, dict[tuple[int, int], _Group]] = {}

    def put(self, view: DecodeView) -> None:
        known = self.views.get(view.instance_id)
        if known is not None and (not view.ready or _kind(known) != _kind(view)):
            self._leave_group(known)
        self.views[view.instance_id] = view
        if view.ready:
            groups = self._groups.setdefault(view.fingerprint, {})
            group = groups.setdefault((view.max_model_len, view.capacity_tokens), _Group())
            group.put(view, self._turn(view.instance_id))

    def remove(self, instance_id: str) -> None:
        """Forget it; nothing happens if it is unknown."""
        view = self._forget(instance_id)
        if view is not None:
            self._leave_group(view)

    def fingerprints_for(self, num_tokens: int) -> Container[str]:
        """Of the instances that are ready and can hold a prompt of that length and an answer. Ask it at once."""
        return _Fingerprints(self._groups, num_tokens)

    def pick(self, *, num_tokens: int, growth_tokens: int, fingerprint: str, avoid: Set[str] = NOBODY) -> str | None:
        best = self._best_of(num_tokens, growth_tokens, fingerprint, avoid, 1)
        return self._take(best[0].rank[3]) if best else None

    def peek(self, *, num_tokens: int, growth_tokens: int, fingerprint: str, avoid: Set[str] = NOBODY) -> Scored | None:
        """What `pick` would choose. It does not count as chosen."""
        best = self._best_of(num_tokens, growth_tokens, fingerprint, avoid, 1)
        return best[0] if best else None

    def choose(self, *, num_tokens: int, growth_tokens: int, fingerprint: str, avoid: Set[str] = NOBODY) -> Choice:
        """As `pick`, with the comparison."""
        best = self._best_of(num_tokens, growth_tokens, fingerprint, avoid, _SHOWN)
        if best:
            self._take(best[0].rank[3])
            return choice_of(best, {}, len(self) - len(best))
        return choose_decode(  # nobody can: say why of each
            self.views.values(),
            num_tokens=num_tokens,
            growth_tokens=growth_tokens,
            fingerprint=fingerprint,
            last_chosen=self.last_chosen,
        )

    def _best_of(
        self, num_tokens: int, growth_tokens: int, fingerprint: str, avoid: Set[str], count: int
    ) -> list[Scored]:
        """As `PrefillBook._best_of`."""
        skip = set(avoid)
        best: list[Scored] = []
        while len(best) < count:
            winner = self._winner(num_tokens, growth_tokens, fingerprint, skip)
            if winner is not None:
                best.append(winner)
                skip.add(winner.rank[3])
            elif avoid and not best and skip:
                skip.clear()
            else:
                break
        return best

    def _winner(self, num_tokens: int, growth_tokens: int, fingerprint: str, skip: Set[str]) -> Scored | None:
        """The best of each group is the one with the least load, or if that must wait the best of those that fit."""
        best: Scored | None = None
        for (max_model_len, capacity_tokens), group in self._groups.get(fingerprint, {}).items():
            if num_tokens >= max_model_len:
                continue
            room = capacity_tokens - min(num_tokens + growth_tokens, max_model_len)
            first = group.first(skip)
            if first is None:
                continue
            candidates = [first]
            if self.views[first].claimed_tokens > room:
                fitting = group.first_within(room, skip)
                candidates += [] if fitting is None else [fitting]
            for instance_id in candidates:
                scored = score_decode(
                    self.views[instance_id],
                    num_tokens=num_tokens,
                    growth_tokens=growth_tokens,
                    last_chosen=self._turn(instance_id),
                )
                if best is None or scored.rank < best.rank:
                    best = scored
        return best

    def _leave_group(self, view: DecodeView) -> None:
        groups = self._groups.get(view.fingerprint, {})
        group = groups.get((view.max_model_len, view.capacity_tokens))
        if group is not None:
            group.discard(view.instance_id)
            if not len(group.by_load):
                del groups[view.max_model_len, view.capacity_tokens]


def _kind(view: DecodeView) -> tuple[str, int, int]:
    return view.fingerprint, view.max_model_len, view.capacity_tokens


class _Fingerprints:
    """Those of the groups whose instances can hold so many tokens and one more."""

    __slots__ = ("_groups", "_num_tokens")

    def __init__(self, groups: dict[str, dict[tuple[int, int], _Group]], num_tokens: int) -> None:
        self._groups = groups
        self._num_tokens = num_tokens

    def __contains__(self, fingerprint: object) -> bool:
        return any(
            self._num_tokens < max_model_len
            for max_model_len, _ in self._groups.get(fingerprint, ())  # type: ignore[call-overload]
        )
