"""Which instance a request goes to, and why. Pure functions of what the router knows at that moment.

They compare every instance: the definition of the policy. `scheduling.load_book` finds the same winner without that.
"""

from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass

from tandem.core.errors import ContextLengthError, UnavailableError


@dataclass(frozen=True, slots=True)
class PrefillView:
    """What the router knows of a prefill instance, its own not yet reported submissions included.

    `cached_prefix_tokens` is of the prompt at hand; `queued_tokens` are those it has yet to compute.
    """

    instance_id: str
    fingerprint: str
    ready: bool
    max_model_len: int
    queued_tokens: int
    running: int
    cached_prefix_tokens: int = 0


@dataclass(frozen=True, slots=True)
class DecodeView:
    """What the router knows of a decode instance, its own not yet reported requests included.

    `free_blocks` can be allocated at once; `waiting_tokens` are of requests that wait there for a reservation.
    """

    instance_id: str
    fingerprint: str
    ready: bool
    max_model_len: int
    block_size: int
    total_blocks: int
    free_blocks: int
    running: int
    waiting: int = 0
    waiting_tokens: int = 0

    @property
    def capacity_tokens(self) -> int:
        return self.total_blocks * self.block_size

    @property
    def claimed_tokens(self) -> int:
        """KV memory in use, and what the waiting requests will take."""
        return (self.total_blocks - self.free_blocks) * self.block_size + self.waiting_tokens

    @property
    def load(self) -> float:
        """The part of its score that is the same for every request: terms "memory" and "batch" of `choose_decode`."""
        sequences = self.running + self.waiting
        return self.claimed_tokens / self.capacity_tokens + sequences / (sequences + BATCH_OF_EQUAL_TERMS)


# A decode step takes base + n * slope; the batch n at which the two are equal. Of a larger batch more than half of the
# step's time is its sequences' doing. The router knows no cost model; any n of this order gives a like ranking.
BATCH_OF_EQUAL_TERMS = 32


@dataclass(frozen=True, slots=True)
class Candidate:
    """One instance that was looked at. `score` is the sum of `terms`, the lowest wins; None: it could not be chosen.

    `reason` says why it lost, in words; it is empty for the chosen one.
    """

    instance_id: str
    score: float | None
    terms: tuple[tuple[str, float], ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The decision, and the comparison behind it, best first. `others` more instances were not written down."""

    instance_id: str | None
    candidates: tuple[Candidate, ...]
    too_long: bool = False  # nothing was chosen, and the request's length alone is why
    others: int = 0

    def require(self) -> str:
        """The chosen instance. Raises ContextLengthError if the prompt fits nowhere, else UnavailableError."""
        if self.instance_id is not None:
            return self.instance_id
        if self.too_long:
            raise ContextLengthError("The prompt is longer than any worker's context; shorten it.")
        raise UnavailableError("No worker can take the request now; try again later.")

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


@dataclass(frozen=True, slots=True)
class Scored:
    """An instance that could be chosen. The least `rank` wins: (score, load, number of the choice that took it last,
    id). So among equals the one with less load, and then the one chosen longest ago, is next."""

    terms: Terms
    rank: tuple[float, float, int, str]


def score_prefill(
    view: PrefillView, *, num_tokens: int, shortest_tokens: int, slack_tokens: int, last_chosen: int
) -> Scored:
    """As `choose_prefill` compares it, where `shortest_tokens` is the shortest queue of all that could be chosen."""
    overloaded = view.queued_tokens > shortest_tokens + slack_tokens
    credit = 0 if overloaded else min(view.cached_prefix_tokens, num_tokens - 1)
    terms = (("queued", view.queued_tokens), ("prompt", num_tokens), ("cached", -credit))
    return Scored(terms, (view.queued_tokens + num_tokens - credit, 0.0, last_chosen, view.instance_id))


def score_decode(view: DecodeView, *, num_tokens: int, growth_tokens: int, last_chosen: int) -> Scored:
    """As `choose_decode` compares it."""
    capacity, load = view.capacity_tokens, view.load
    grown = min(num_tokens + growth_tokens, view.max_model_len)
    memory = view.claimed_tokens / capacity
    wait = float(view.claimed_tokens + grown > capacity)
    terms = (("memory", memory), ("batch", load - memory), ("sequence", grown / capacity), ("wait", wait))
    return Scored(terms, (load + grown / capacity + wait, load, last_chosen, view.instance_id))


def choose_prefill(
    views: Collection[PrefillView],
    *,
    num_tokens: int,
    decode_fingerprints: Container[str],
    slack_tokens: int,
    last_chosen: Mapping[str, int],
) -> Choice:
    """The instance that will have computed a prompt of `num_tokens` first, counted in tokens.

    score = tokens queued before it + its own tokens not cached there. An instance whose queue is longer than the
    shortest by more than `slack_tokens` gets no credit for its cache: a popular prefix must not pile all work on one
    instance. `decode_fingerprints` are those of the live decode instances. Equal scores go to the one chosen longest
    ago: `last_chosen` numbers the choices, and has no entry where an instance was never chosen.
    """
    usable = [
        view
        for view in views
        if view.ready and view.fingerprint in decode_fingerprints and num_tokens < view.max_model_len
    ]
    shortest = min((view.queued_tokens for view in usable), default=0)
    scored = [
        score_prefill(
            view,
            num_tokens=num_tokens,
            shortest_tokens=shortest,
            slack_tokens=slack_tokens,
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
        elif num_tokens >= view.max_model_len:
            refused[view.instance_id] = _too_long(view.max_model_len)
    return choice_of(scored, refused)


def choose_decode(
    views: Collection[DecodeView],
    *,
    num_tokens: int,
    growth_tokens: int,
    fingerprint: str,
    last_chosen: Mapping[str, int],
) -> Choice:
    """The instance on which a sequence of `num_tokens` that grows by `growth_tokens` finds most room.

    score = share of the KV memory that is in use, or will be by what waits there  (memory)
          + n / (n + BATCH_OF_EQUAL_TERMS) for n sequences running or waiting       (batch)
          + share of the KV memory that this sequence will have grown to            (sequence)
          + 1 if it does not fit, and so would wait for a reservation.              (wait)

    "batch" is the share of a step's time that its sequences cause, and so depends on this instance only. A share of the
    busiest instance's batch would move every score when one instance's load changes, and no order could be kept.
    Memory is counted in tokens: what sequences lose by whole blocks is in `free_blocks`, of those that wait it is not.

    Only instances with the prefill instance's `fingerprint` count. Equal scores: as in `choose_prefill`.
    """
    scored: list[Scored] = []
    refused: dict[str, str] = {}
    for view in views:
        if not view.ready:
            refused[view.instance_id] = "not ready"
        elif view.fingerprint != fingerprint:
            refused[view.instance_id] = "its KV layout is not the prefill instance's"
        elif num_tokens >= view.max_model_len:
            refused[view.instance_id] = _too_long(view.max_model_len)
        else:
            scored.append(
                score_decode(
                    view,
                    num_tokens=num_tokens,
                    growth_tokens=growth_tokens,
                    last_chosen=last_chosen.get(view.instance_id, 0),
                )
            )
    return choice_of(scored, refused)


_TOO_LONG = "its context is too short"


def _too_long(max_model_len: int) -> str:
    return f"{_TOO_LONG} ({max_model_len} tokens)"


def choice_of(scored: Collection[Scored], refused: Mapping[str, str], others: int = 0) -> Choice:
    """The least rank wins. `refused` says of each instance that could not be chosen why; `others` were left out."""
    candidates: list[Candidate] = []
    best = min((it.rank for it in scored), default=None)
    for it in sorted(scored, key=lambda it: it.rank):
        assert best is not None
        lost_by = it.rank[0] - best[0]
        reason = f"worse by {lost_by:g}" if lost_by > 0 else "equal; another's turn"
        candidates.append(Candidate(it.rank[3], it.rank[0], it.terms, "" if it.rank == best else reason))
    candidates.extend(Candidate(instance_id, None, (), refused[instance_id]) for instance_id in sorted(refused))
    too_long = best is None and any(reason.startswith(_TOO_LONG) for reason in refused.values())
    return Choice(None if best is None else best[3], tuple(candidates), too_long, others)
