"""The order of thousands of prefill instances by the length of their queues. See `scheduling.instance_index`."""

from collections.abc import Container, Iterable, Mapping, Set
from dataclasses import replace
from typing import NamedTuple

from tandem.scheduling.instance_index import NO_FAILURES, NO_INSTANCES, SHOWN, InstanceIndex
from tandem.scheduling.routing import PrefillView, Scored, Selection, choose_prefill, score_prefill, selection_of
from tandem.scheduling.sorted_by_load import Entry, SortedByLoad

Holders = Iterable[tuple[int, Set[str]]]  # as `PrefixTracker.holders` gives them


class _Prompt(NamedTuple):
    """A request to choose a prefill instance for. `holders`: most tokens first."""

    num_tokens: int
    needed_tokens: int
    decode_fingerprints: Container[str]
    holders: tuple[tuple[int, Set[str]], ...]
    failures: Mapping[str, float]


class PrefillIndex(InstanceIndex[PrefillView]):
    """Prefill instances by the length of their queues. See `routing.choose_prefill` for the policy."""

    __slots__ = ("_orders", "_slack_tokens")

    def __init__(self, slack_tokens: int) -> None:
        super().__init__()
        self._slack_tokens = slack_tokens
        self._orders: dict[int, SortedByLoad] = {}  # by max_model_len; of those that are ready

    def put(self, view: PrefillView) -> None:
        """As in the base; `cached_prefix_tokens` is of no account."""
        known = self.views.get(view.instance_id)
        if known is not None and (known.max_model_len != view.max_model_len or not view.ready):
            self._orders[known.max_model_len].discard(view.instance_id)
        self.views[view.instance_id] = view
        order = self._orders.setdefault(view.max_model_len, SortedByLoad())
        if view.ready:
            order.put(view.instance_id, view.queued_tokens, self._turn(view.instance_id))

    def remove(self, instance_id: str) -> None:
        """Forget it; nothing happens if it is unknown."""
        view = self._forget(instance_id)
        if view is not None:
            self._orders[view.max_model_len].discard(instance_id)

    def best(
        self,
        *,
        num_tokens: int,
        needed_tokens: int,
        decode_fingerprints: Container[str],
        holders: Holders = (),
        avoid: Set[str] = NO_INSTANCES,
        exclude: Set[str] = NO_INSTANCES,
        failures: Mapping[str, float] = NO_FAILURES,
    ) -> Scored | None:
        """`holders` are the instances that have leading tokens of the prompt cached."""
        prompt = _Prompt(num_tokens, needed_tokens, decode_fingerprints, tuple(holders), failures)
        best = self._best_of(prompt, avoid, exclude, 1)
        return best[0] if best else None

    def select(
        self,
        *,
        num_tokens: int,
        needed_tokens: int,
        decode_fingerprints: Container[str],
        holders: Holders = (),
        avoid: Set[str] = NO_INSTANCES,
        exclude: Set[str] = NO_INSTANCES,
        failures: Mapping[str, float] = NO_FAILURES,
    ) -> Selection:
        """As `best`, with the comparison."""
        prompt = _Prompt(num_tokens, needed_tokens, decode_fingerprints, tuple(holders), failures)
        best = self._best_of(prompt, avoid, exclude, SHOWN)
        if best:
            return selection_of(best, {}, len(self) - len(best))
        return choose_prefill(  # none can: say why of each
            [view for view in self.views.values() if view.instance_id not in exclude],
            num_tokens=num_tokens,
            needed_tokens=needed_tokens,
            decode_fingerprints=decode_fingerprints,
            slack_tokens=self._slack_tokens,
            failures=failures,
            last_chosen=self.last_chosen,
        )

    def _best_of(self, prompt: _Prompt, avoid: Set[str], exclude: Set[str], count: int) -> list[Scored]:
        """The first `count` of the full comparison, or fewer if there are no more. Without `avoid`, unless only those
        are left. Those that failed lately are few, and are compared one by one."""
        skip = {*avoid, *exclude}
        shortest = self._first_where(prompt, skip, None)
        if shortest is None and avoid:
            skip = set(exclude)
            shortest = self._first_where(prompt, skip, None)
        if shortest is None:
            return []
        shortest_tokens = int(shortest[0])
        if not prompt.holders and not prompt.failures and count == 1:
            return [self._score(shortest[2], prompt, shortest_tokens)]
        failed = [instance_id for instance_id in prompt.failures if self._is_usable(instance_id, prompt, skip)]
        compared = sorted((self._score(each, prompt, shortest_tokens) for each in failed), key=lambda each: each.rank)
        skip.update(failed)
        best: list[Scored] = []
        while len(best) < count:
            winner = self._winner(prompt, skip, shortest_tokens)
            scored = None if winner is None else self._score(winner, prompt, shortest_tokens)
            if compared and (scored is None or compared[0].rank < scored.rank):
                best.append(compared.pop(0))
            elif scored is not None:
                best.append(scored)
                skip.add(scored.rank[3])
            else:
                break
        return best

    def _score(self, instance_id: str, prompt: _Prompt, shortest_tokens: int) -> Scored:
        view = self.views[instance_id]
        cached_tokens = next((tokens for tokens, holders in prompt.holders if instance_id in holders), 0)
        return score_prefill(
            replace(view, cached_prefix_tokens=cached_tokens) if cached_tokens else view,
            num_tokens=prompt.num_tokens,
            shortest_tokens=shortest_tokens,
            slack_tokens=self._slack_tokens,
            failures=prompt.failures.get(instance_id, 0.0),
            last_chosen=self._turn(instance_id),
        )

    def _winner(self, prompt: _Prompt, skip: Set[str], shortest_tokens: float) -> str | None:
        """Whoever wins has the shortest queue of all that have as much of the prompt cached, so one instance is looked
        at for each length of cached prefix."""
        best = self._first_where(prompt, skip, None)
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

    def _shortest_among(self, holders: Set[str], prompt: _Prompt, skip: Set[str]) -> Entry | None:
        """Few are looked at one by one; of many, one is soon met on the way from the shortest queue."""
        if len(holders) ** 2 > len(self.views):
            return self._first_where(prompt, skip, holders)
        entries = (
            self._orders[self.views[instance_id].max_model_len].entry(instance_id)
            for instance_id in holders
            if self._is_usable(instance_id, prompt, skip)
        )
        return min(entries, default=None)

    def _first_where(self, prompt: _Prompt, skip: Set[str], among: Set[str] | None) -> Entry | None:
        """The shortest queue of all that can take the prompt."""
        best: Entry | None = None
        for max_model_len, order in self._orders.items():
            if prompt.needed_tokens > max_model_len:
                continue
            for entry in order:
                if best is not None and best < entry:
                    break
                if among is not None and entry[2] not in among:
                    continue
                if entry[2] not in skip and self.views[entry[2]].fingerprint in prompt.decode_fingerprints:
                    best = entry
                    break
        return best

    def _is_usable(self, instance_id: str, prompt: _Prompt, skip: Set[str]) -> bool:
        view = self.views.get(instance_id)
        if view is None or not view.ready or instance_id in skip:
            return False
        return prompt.needed_tokens <= view.max_model_len and view.fingerprint in prompt.decode_fingerprints
