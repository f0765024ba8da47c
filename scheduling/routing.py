"""Which instance a request goes to, and why. Pure functions of what the router knows at that moment.

They compare every instance: the definition of the policy. `scheduling.instance_index` finds the same winner without
comparing all instances.
"""

from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass
from typing import NamedTuple

# A decode step takes base + n * slope; the batch n at which the two are equal. Of a larger batch more than half of the
# step's time is its sequences' doing. The router knows no cost model; any n of this order gives a like ranking.
BATCH_OF_EQUAL_TERMS = 32

# One recent failure weighs as much as this prompt before a prefill instance, or as full memory of a decode instance.
FAILURE_TOKENS = 4096


@dataclass(slots=True)
class PrefillView:
    """What the router knows of an instance that computes prompts, its own dispatches included. A value: never changed.

    `max_model_len` is the longest prompt plus answer; `cached_prefix_tokens` are of the prompt at hand.
    """

    instance_id: str
    fingerprint: str
    ready: bool
    max_model_len: int
    queued_tokens: int
    cached_prefix_tokens: int = 0


@dataclass(slots=True)
class DecodeView:
    """What the router knows of an instance that decodes, its own dispatches included. A value: never changed.

    `claimed_tokens` is KV memory in use, and what the waiting requests will take; `sequences` run or wait.
    """

    instance_id: str
    fingerprint: str
    ready: bool
    max_model_len: int
    capacity_tokens: int
    claimed_tokens: int
    sequences: int

    @property
    def load(self) -> float:
        """The part of its score that is the same for every request: terms "memory" and "batch" of `choose_decode`."""
        return self.claimed_tokens / self.capacity_tokens + self.sequences / (self.sequences + BATCH_OF_EQUAL_TERMS)

    def must_wait(self, num_tokens: int, growth_tokens: int) -> bool:
        """Whether a sequence of `num_tokens` that grows by `growth_tokens` finds no memory."""
        grown_tokens = min(num_tokens + growth_tokens, self.max_model_len)
        return self.claimed_tokens + grown_tokens > self.capacity_tokens


class Candidate(NamedTuple):
    """One instance that was compared. `score` is the sum of `terms`, the lowest wins; None: it could not be chosen.

    `reason` says why it lost, in words; it is empty for the chosen one.
    """

    instance_id: str
    score: float | None
    terms: tuple[tuple[str, float], ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Selection:
    """The decision, and the comparison behind it, best first. `others` more instances were not written down."""

    instance_id: str | None
    candidates: tuple[Candidate, ...]
    others: int = 0

    def explain(self) -> str:
        """One line per candidate, for a person."""
        lines = []
        for candidate in self.candidates:
            terms = " + ".join(f"{name} {value:g}" for name, value in candidate.terms)
            score = "" if candidate.score is None else f" = {candidate.score:g}"
            lines.append(f"{candidate.instance_id}: {terms}{score}  {candidate.reason or 'chosen'}")
        if self.others:
            lines.append(f"and {self.others} more that were no better")
        return "\n".join(lines) or "no instances"


Terms = tuple[tuple[str, float], ...]


class Scored(NamedTuple):
    """An instance that could be chosen. The least `rank` wins: (score, load, number of the choice that took it last,
    id). So among equals the one with less load, and then the one chosen longest ago, is next."""

    terms: Terms
    rank: tuple[float, float, int, str]


def score_prefill(
    view: PrefillView, *, num_tokens: int, shortest_tokens: int, slack_tokens: int, failures: float, last_chosen: int
) -> Scored:
    """As `choose_prefill` compares it, where `shortest_tokens` is the shortest queue of all that could be chosen."""
    overloaded = view.queued_tokens > shortest_tokens + slack_tokens
    credit = 0 if overloaded else min(view.cached_prefix_tokens, num_tokens - 1)
    terms: Terms = (("queued", view.queued_tokens), ("prompt", num_tokens), ("cached", -credit))
    score: float = view.queued_tokens + num_tokens - credit
    if failures:
        terms += (("failures", failures * FAILURE_TOKENS),)
        score += failures * FAILURE_TOKENS
    return Scored(terms, (score, 0.0, last_chosen, view.instance_id))


def score_decode(view: DecodeView, *, num_tokens: int, growth_tokens: int, failures: float, last_chosen: int) -> Scored:
    """As `choose_decode` compares it."""
    capacity, load = view.capacity_tokens, view.load
    grown = min(num_tokens + growth_tokens, view.max_model_len)
    memory = view.claimed_tokens / capacity
    wait = float(view.claimed_tokens + grown > capacity)
    terms: Terms = (("memory", memory), ("batch", load - memory), ("sequence", grown / capacity), ("wait", wait))
    score = load + grown / capacity + wait
    if failures:
        terms += (("failures", failures),)
        score += failures
    return Scored(terms, (score, load, last_chosen, view.instance_id))


def choose_prefill(
    views: Collection[PrefillView],
    *,
    num_tokens: int,
    needed_tokens: int,
    decode_fingerprints: Container[str],
    slack_tokens: int,
    failures: Mapping[str, float],
    last_chosen: Mapping[str, int],
) -> Selection:
    """The instance that will have computed a prompt of `num_tokens` first, counted in tokens.

    score = tokens queued before it + its own tokens not cached there + FAILURE_TOKENS for each recent failure. An
    instance whose queue is longer than the shortest by more than `slack_tokens` gets no credit for its cache: a popular
    prefix must not pile all work on one instance. Only instances that can hold `needed_tokens` count, and only those
    whose KV layout is one of `decode_fingerprints`. Equal scores go to the one chosen longest ago: `last_chosen`
    numbers the choices, and has no entry where an instance was never chosen.
    """
    usable = [
        view
        for view in views
        if view.ready and view.fingerprint in decode_fingerprints and needed_tokens <= view.max_model_len
    ]
    shortest = min((view.queued_tokens for view in usable), default=0)
    scored = [
        score_prefill(
            view,
            num_tokens=num_tokens,
            shortest_tokens=shortest,
            slack_tokens=slack_tokens,
            failures=failures.get(view.instance_id, 0.0),
            last_chosen=last_chosen.get(view.instance_id, 0),
        )
        for view in usable
    ]
    refused: dict[str, str] = {}
    for view in views:
        if not view.ready:
            refused[view.instance_id] = "not ready"
        elif view.fingerprint not in decode_fingerprints:
            refused[view.instance_id] = "no decode instance has its KV layout"
        elif needed_tokens > view.max_model_len:
            refused[view.instance_id] = f"its context is too short ({view.max_model_len} tokens)"
    return selection_of(scored, refused)


def choose_decode(
    views: Collection[DecodeView],
    *,
    num_tokens: int,
    growth_tokens: int,
    needed_tokens: int,
    fingerprint: str | None,
    failures: Mapping[str, float],
    last_chosen: Mapping[str, int],
) -> Selection:
    """The instance on which a sequence of `num_tokens` that grows by `growth_tokens` finds most room.

    score = share of the KV memory that is in use, or will be by what waits there  (memory)
          + n / (n + BATCH_OF_EQUAL_TERMS) for n sequences running or waiting       (batch)
          + share of the KV memory that this sequence will have grown to            (sequence)
          + 1 if it does not fit, and so would wait for a reservation               (wait)
          + 1 for each recent failure.                                              (failures)

    "batch" is the share of a step's time that its sequences cause, and so depends on this instance only. A share of the
    busiest instance's batch would move every score when one instance's load changes, and no order could be kept.

    Only instances that can hold `needed_tokens` count, and of these the ones with the prefill instance's `fingerprint`;
    None: any, since the same instance computes the prompt. Equal scores: as in `choose_prefill`.
    """
    scored: list[Scored] = []
    refused: dict[str, str] = {}
    for view in views:
        if not view.ready:
            refused[view.instance_id] = "not ready"
        elif fingerprint is not None and view.fingerprint != fingerprint:
            refused[view.instance_id] = "its KV layout is not the prefill instance's"
        elif needed_tokens > view.max_model_len:
            refused[view.instance_id] = f"its context is too short ({view.max_model_len} tokens)"
        else:
            scored.append(
                score_decode(
                    view,
                    num_tokens=num_tokens,
                    growth_tokens=growth_tokens,
                    failures=failures.get(view.instance_id, 0.0),
                    last_chosen=last_chosen.get(view.instance_id, 0),
                )
            )
    return selection_of(scored, refused)


def selection_of(scored: Collection[Scored], refused: Mapping[str, str], others: int = 0) -> Selection:
    """The least rank wins. `refused` says of each instance that could not be chosen why; `others` were left out."""
    candidates: list[Candidate] = []
    best = min((each.rank for each in scored), default=None)
    for each in sorted(scored, key=lambda each: each.rank):
        assert best is not None
        lost_by = each.rank[0] - best[0]
        reason = f"worse by {lost_by:g}" if lost_by > 0 else "equal; another's turn"
        if any(name == "failures" for name, _ in each.terms):
            reason += "; requests failed there recently"
        candidates.append(Candidate(each.rank[3], each.rank[0], each.terms, "" if each.rank == best else reason))
    candidates.extend(Candidate(instance_id, None, (), refused[instance_id]) for instance_id in sorted(refused))
    return Selection(None if best is None else best[3], tuple(candidates), others)
