"""Which instance a request goes to, and why. Pure functions of what the router knows at that moment."""

from collections.abc import Collection
from dataclasses import dataclass

from core.errors import ContextLengthError, UnavailableError


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
    """The decision, and the whole comparison behind it, best first."""

    instance_id: str | None
    candidates: tuple[Candidate, ...]
    too_long: bool = False  # nothing was chosen, and the request's length alone is why

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
        return "\n".join(lines) or "no instances"


def choose_prefill(
    views: Collection[PrefillView],
    *,
    num_tokens: int,
    decode_fingerprints: Collection[str],
    rotation: int,
    slack_tokens: int,
) -> Choice:
    """The instance that will have computed a prompt of `num_tokens` first, counted in tokens.

    score = tokens queued before it + its own tokens not cached there. An instance whose queue is longer than the
    shortest by more than `slack_tokens` gets no credit for its cache: a popular prefix must not pile all work on one
    instance. `decode_fingerprints` are those of the live decode instances. Equal scores take turns by `rotation`, a
    number that the caller counts up.
    """
    usable = [
        view
        for view in views
        if view.ready and view.fingerprint in decode_fingerprints and num_tokens < view.max_model_len
    ]
    shortest = min((view.queued_tokens for view in usable), default=0)
    scored: dict[str, tuple[tuple[str, float], ...]] = {}
    for view in usable:
        overloaded = view.queued_tokens > shortest + slack_tokens
        credit = 0 if overloaded else min(view.cached_prefix_tokens, num_tokens - 1)
        scored[view.instance_id] = (("queued", view.queued_tokens), ("prompt", num_tokens), ("cached", -credit))
    refused: dict[str, str] = {}
    for view in views:
        if view.instance_id in scored:
            continue
        if not view.ready:
            refused[view.instance_id] = "not ready"
        elif view.fingerprint not in decode_fingerprints:
            refused[view.instance_id] = "no decode instance has its KV layout"
        else:
            refused[view.instance_id] = _too_long(view.max_model_len)
    return _choose(scored, refused, rotation)


def choose_decode(
    views: Collection[DecodeView],
    *,
    num_tokens: int,
    growth_tokens: int,
    fingerprint: str,
    rotation: int,
) -> Choice:
    """The instance on which a sequence of `num_tokens` that grows by `growth_tokens` finds most room.

    score = share of the KV memory in use once all that waits there and this sequence have grown
          + the instance's share of the sequences (of itself and the busiest one)
          + 1 if it does not fit, and so would wait for a reservation.
    Only instances with the prefill instance's `fingerprint` count. Equal scores take turns by `rotation`.
    """
    usable = [
        view for view in views if view.ready and view.fingerprint == fingerprint and num_tokens < view.max_model_len
    ]
    busiest = max((view.running + view.waiting for view in usable), default=0)
    scored: dict[str, tuple[tuple[str, float], ...]] = {}
    for view in usable:
        grown = min(num_tokens + growth_tokens, view.max_model_len)
        headroom = view.free_blocks - -(-(view.waiting_tokens + grown) // view.block_size)
        scored[view.instance_id] = (
            ("memory", (view.total_blocks - headroom) / view.total_blocks),
            ("batch", (view.running + view.waiting) / (busiest + 1)),
            ("wait", float(headroom < 0)),
        )
    refused: dict[str, str] = {}
    for view in views:
        if view.instance_id in scored:
            continue
        if not view.ready:
            refused[view.instance_id] = "not ready"
        elif view.fingerprint != fingerprint:
            refused[view.instance_id] = "its KV layout is not the prefill instance's"
        else:
            refused[view.instance_id] = _too_long(view.max_model_len)
    return _choose(scored, refused, rotation)


_TOO_LONG = "its context is too short"


def _too_long(max_model_len: int) -> str:
    return f"{_TOO_LONG} ({max_model_len} tokens)"


def _choose(scored: dict[str, tuple[tuple[str, float], ...]], refused: dict[str, str], rotation: int) -> Choice:
    """Lowest sum of terms wins; among equals the first at or after place `rotation` of the ids in order."""
    ids = sorted(scored)
    turn = {instance_id: (place - rotation) % len(ids) for place, instance_id in enumerate(ids)}
    score = {instance_id: sum(value for _, value in terms) for instance_id, terms in scored.items()}
    ids.sort(key=lambda instance_id: (score[instance_id], turn[instance_id]))
    candidates = []
    for instance_id in ids:
        lost_by = score[instance_id] - score[ids[0]]
        reason = f"worse by {lost_by:g}" if lost_by > 0 else "equal; another's turn"
        candidates.append(
            Candidate(instance_id, score[instance_id], scored[instance_id], "" if instance_id == ids[0] else reason)
        )
    candidates.extend(Candidate(instance_id, None, (), refused[instance_id]) for instance_id in sorted(refused))
    too_long = not ids and any(reason.startswith(_TOO_LONG) for reason in refused.values())
    return Choice(ids[0] if ids else None, tuple(candidates), too_long)
