"""A request may go to a pair of instances, one for each phase, or to one that serves both: which, and why. Pure.

`scheduling.routing` finds the best of each sort; their promises are then compared here. Both are seconds that a cost
model predicts, and a promise's pressure is the worse of the two shares that it takes of the request's targets:

    pressure = max(TTFT / its target, TPOT / its target)

The least pressure wins. As load grows, the sort that keeps its targets more easily is preferred until it does not, so
both reach their limits at the same rate, whatever that is for each of them and whichever phase sets it: together they
serve what they serve apart. (The shortest queue alone would fill whoever is quick to prefill far beyond what its
decoding can take.)
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from tandem.core.cost_model import CostModel, StepLoad, attention_pairs
from tandem.scheduling.colocated import Mixing
from tandem.scheduling.routing import Choice, DecodeView, Scored, choice_of


@dataclass(frozen=True, slots=True)
class Targets:
    """Of the request's SLO class. The usual ones serve where none are known: only their ratio matters then."""

    ttft_s: float = 1.0
    tpot_s: float = 0.05


@dataclass(frozen=True, slots=True)
class Pace:
    """What an instance needs for its steps. `max_batch_tokens` bounds a step's prompt tokens, `max_batch` the sequences
    that decode; `mixing` is of a colocated instance."""

    cost: CostModel
    max_batch_tokens: int
    max_batch: int
    mixing: Mixing = "chunked"
    prompt_tokens_per_s: float = field(init=False)  # while nothing decodes

    def __post_init__(self) -> None:
        cost = self.cost.step(StepLoad.of_prompts(self.max_batch_tokens))
        object.__setattr__(self, "prompt_tokens_per_s", self.max_batch_tokens / (cost.interval_s or cost.total_s))

    def decode_step_s(self, sequences: int, kv_tokens: int) -> float:
        base_s, per_kv_token_s = self.cost.decode_coefficients(sequences)
        return base_s + per_kv_token_s * kv_tokens

    def prompt_tokens_per_s_beside(self, sequences: int, kv_tokens: int) -> float:
        """While so many sequences decode over so much KV: chunks share their steps with them, whole prompts do not."""
        if self.mixing != "chunked" or sequences == 0:
            return self.prompt_tokens_per_s
        chunk = max(1, self.max_batch_tokens - sequences)
        load = StepLoad(
            prefill_tokens=chunk,
            prefill_sequences=1,
            prefill_pairs=attention_pairs(0, chunk),
            prefill_kv_tokens=chunk,
            decode_sequences=sequences,
            decode_kv_tokens=kv_tokens,
            sampled=sequences,
        )
        return chunk / self.cost.step(load).total_s


@dataclass(frozen=True, slots=True)
class Offer:
    """What a request can expect where it would begin on `instance_id`. `has_room`: it would not have to wait for others
    to end before it decodes."""

    instance_id: str
    ttft_s: float
    tpot_s: float
    has_room: bool


def pair_offer(
    prefill_id: str,
    uncomputed_tokens: float,
    prefill: Pace,
    view: DecodeView,
    decode: Pace,
    *,
    num_tokens: int,
    growth_tokens: int,
) -> Offer:
    """A pair's. `uncomputed_tokens`: before it and of its own, on the prefill instance; `view` is of the decode
    instance that it would go to now. It grows by `growth_tokens`."""
    grown = min(num_tokens + growth_tokens, view.max_model_len)
    return Offer(
        prefill_id,
        uncomputed_tokens / prefill.prompt_tokens_per_s,
        decode.decode_step_s(view.running + view.waiting + 1, view.claimed_tokens + grown),
        _has_room(view, grown, decode),
    )


def colocated_offer(
    view: DecodeView,
    pace: Pace,
    *,
    queued_tokens: int,
    prompt_tokens_per_step: float,
    num_tokens: int,
    growth_tokens: int,
) -> Offer:
    """A colocated instance's, which has `queued_tokens` of prompts to compute before it.

    Its decoding is held up by the prompts that come: a request of p prompt tokens and an answer of n leaves after n
    steps, and where the load is steady another one comes, so it stands for p / n prompt tokens in every step.
    `prompt_tokens_per_step` is their sum over the requests that are there.
    """
    grown = min(num_tokens + growth_tokens, view.max_model_len)
    sequences = view.running + view.waiting
    speed = pace.prompt_tokens_per_s_beside(min(sequences, pace.max_batch), view.claimed_tokens)
    prompts = prompt_tokens_per_step + num_tokens / max(1, growth_tokens)
    return Offer(
        view.instance_id,
        (queued_tokens + num_tokens) / speed,
        pace.decode_step_s(sequences + 1, view.claimed_tokens + grown) + prompts / pace.prompt_tokens_per_s,
        _has_room(view, grown, pace),
    )


def choose_offer(offers: Collection[Offer], targets: Targets, last_chosen: Mapping[str, int]) -> Choice:
    """The least pressure of those that have room; of all, where none has. Equal ones: as in `routing.choose_prefill`.

    The candidates' terms are the shares of the two targets, and what the lesser one takes off their sum.
    """
    with_room = [offer for offer in offers if offer.has_room]
    scored = []
    for offer in with_room or offers:
        ttft, tpot = offer.ttft_s / targets.ttft_s, offer.tpot_s / targets.tpot_s
        terms = (("ttft", ttft), ("tpot", tpot), ("lesser", -min(ttft, tpot)))
        scored.append(Scored(terms, (max(ttft, tpot), 0.0, last_chosen.get(offer.instance_id, 0), offer.instance_id)))
    refused = {offer.instance_id: "its batch or its memory is full" for offer in offers if not offer.has_room}
    return choice_of(scored, refused if with_room else {})


def _has_room(view: DecodeView, grown_tokens: int, pace: Pace) -> bool:
    is_free = view.running + view.waiting < pace.max_batch
    return is_free and view.claimed_tokens + grown_tokens <= view.capacity_tokens
