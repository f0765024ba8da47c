"""The order of thousands of decode instances by memory and batch. See `scheduling.load_book`."""

from collections.abc import Container, Set
from itertools import islice

from tandem.scheduling.load_book import NOBODY, SHOWN, LoadBook
from tandem.scheduling.load_order import LoadOrder
from tandem.scheduling.routing import Choice, DecodeView, Scored, choice_of, choose_decode, score_decode


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


class DecodeBook(LoadBook[DecodeView]):
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
        best = self._best_of(num_tokens, growth_tokens, fingerprint, avoid, SHOWN)
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
