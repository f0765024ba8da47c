"""The policy by which an instance is selected for a request. Pure functions of the router's knowledge at one moment.

They compare all instances, and so define the policy. `scheduling.instance_index` selects the same instance without
comparing all.
"""

from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass
from typing import NamedTuple

# A decode step of n sequences takes base + n * slope. This is the n at which both terms are equal: in a larger batch
# the sequences cause more than half of the step's time. The router has no cost model here, and any n of this order of
# magnitude gives a similar ranking.
BATCH_OF_EQUAL_TERMS = 32

# One recent failure of a prefill instance counts as a prompt of this length in its queue. One of a decode instance
# counts as full memory.
FAILURE_TOKENS = 4096


@dataclass(slots=True)
class PrefillView:
    """The router's knowledge of an instance that computes prompts, with the attempts that it has just sent. Never
    changed.

    `max_model_len` is the longest prompt plus answer. `cached_prefix_tokens` belongs to the prompt of one query.
    """

    instance_id: str
    fingerprint: str
    ready: bool
    max_model_len: int
    queued_tokens: int
    cached_prefix_tokens: int = 0


@dataclass(slots=True)
class DecodeView:
    """The router's knowledge of an instance that decodes, with the attempts that it has just sent. Never changed.

    `claimed_tokens` are KV slots in use, or needed by waiting requests. `sequences` counts running and waiting ones.
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
        """The part of the score that is the same for every request: terms "memory" and "batch" of `choose_decode`."""
        return self.claimed_tokens / self.capacity_tokens + self.sequences / (self.sequences + BATCH_OF_EQUAL_TERMS)

    def must_wait(self, num_tokens: int, growth_tokens: int) -> bool:
        """Whether a sequence of `num_tokens` that grows by `growth_tokens` would wait for memory."""
        grown_tokens = min(num_tokens + growth_tokens, self.max_model_len)
        return self.claimed_tokens + grown_tokens > self.capacity_tokens


class Candidate(NamedTuple):
    """One compared instance. `score` is the sum of `terms`, and the lowest score is selected; None: the instance cannot
    take the request. `reason` says in words why it was not selected; empty for the selected instance.
    """

    instance_id: str
    score: float | None
    terms: tuple[tuple[str, float], ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Selection:
    """The selected instance, and the comparison behind the decision, best first. `others` counts the instances that
    are not in `candidates`."""

    instance_id: str | None
    candidates: tuple[Candidate, ...]
    others: int = 0

    def explain(self) -> str:
        """The comparison as text, one line for each candidate."""
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
    """A candidate with its score. The lowest `rank` is selected: (score, load, number of the selection that took the
    instance last, id). With equal scores this is the instance with less load, then the one selected longest ago."""

    terms: Terms
    rank: tuple[float, float, int, str]


def score_prefill(
    view: PrefillView, *, num_tokens: int, shortest_tokens: int, slack_tokens: int, failures: float, last_chosen: int
) -> Scored:
    """The score of `choose_prefill`. `shortest_tokens` is the shortest queue of all candidates."""
    overloaded = view.queued_tokens > shortest_tokens + slack_tokens
    credit = 0 if overloaded else min(view.cached_prefix_tokens, num_tokens - 1)
    terms: Terms = (("queued", view.queued_tokens), ("prompt", num_tokens), ("cached", -credit))
    score: float = view.queued_tokens + num_tokens - credit
    if failures:
        terms += (("failures", failures * FAILURE_TOKENS),)
        score += failures * FAILURE_TOKENS
    return Scored(terms, (score, 0.0, last_chosen, view.instance_id))


def score_decode(view: DecodeView, *, num_tokens: int, growth_tokens: int, failures: float, last_chosen: int) -> Scored:
    """The score of `choose_decode`."""
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

    score = tokens in the queue + the prompt's tokens that are not cached there + FAILURE_TOKENS for each recent failure

    Cached tokens do not count on an instance whose queue is longer than the shortest by more than `slack_tokens`, so
    that a popular prefix does not send all work to one instance. Candidates are the ready instances that can hold
    `needed_tokens` and whose fingerprint is one of `decode_fingerprints`. With equal scores the instance that was
    selected longest ago is next: `last_chosen` has the number of the selection that took each instance last.
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
    """The instance with the most memory and the smallest batch for a sequence of `num_tokens` that grows by
    `growth_tokens`.

    score = share of the KV memory that is in use, or needed by waiting requests  (memory)
          + n / (n + BATCH_OF_EQUAL_TERMS) for n running and waiting sequences    (batch)
          + share of the KV memory that this sequence will need                   (sequence)
          + 1 if it would wait for memory                                         (wait)
          + 1 for each recent failure                                             (failures)

    "batch" is the share of a step's time that its sequences cause, so it depends on this instance only. If it were
    relative to the busiest instance, one instance's load would change all scores, and no order could be maintained.

    Candidates are the ready instances that can hold `needed_tokens` and have the `fingerprint` of the prefill instance;
    None: any fingerprint, because the same instance computes the prompt. Equal scores: as in `choose_prefill`.
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
    """Selects the lowest rank. `refused` has the reason for each instance that cannot take the request; `others`
    counts the instances that are in neither argument."""
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
