"""The order of thousands of prefill instances by the length of their queues. See `scheduling.load_book`."""

from collections.abc import Container, Iterable, Set
from dataclasses import dataclass, replace

from tandem.scheduling.load_book import NOBODY, SHOWN, LoadBook
from tandem.scheduling.load_order import Entry, LoadOrder
from tandem.scheduling.routing import Choice, PrefillView, Scored, choice_of, choose_prefill, score_prefill

Holders = Iterable[tuple[int, Set[str]]]  # as `PrefixTracker.holders` gives them


@dataclass(frozen=True, slots=True)
class _Prompt:
    """A request to choose a prefill instance for. `holders`: most tokens first."""

    num_tokens: int
    decode_fingerprints: Container[str]
    holders: tuple[tuple[int, Set[str]], ...]


class PrefillBook(LoadBook[PrefillView]):
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
        best = self._best_of(_Prompt(num_tokens, decode_fingerprints, tuple(holders)), avoid, SHOWN)
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
