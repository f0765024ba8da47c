"""The router's knowledge of load, in `scheduling.load_book`'s order: which instances a request goes to."""

from collections.abc import Iterable

from tandem.core.errors import ContextLengthError
from tandem.placement.simulator.attempt import Attempt
from tandem.placement.simulator.deployment import RouterSpec
from tandem.placement.simulator.instance import SimulatedInstance
from tandem.placement.simulator.prefixes import BlockNames
from tandem.scheduling.decode_book import DecodeBook
from tandem.scheduling.mixed_routing import Offer, Pace, Targets, choose_offer, colocated_offer, pair_offer
from tandem.scheduling.prefill_book import Holders, PrefillBook
from tandem.scheduling.prefix_tracker import PrefixTracker
from tandem.scheduling.routing import DecodeView, PrefillView

# As the live router's.
_SLACK_TOKENS = 4096
_MAX_TRACKED_BLOCKS = 65536


class _Load:
    """What the router has sent to one instance and not yet seen finished."""

    __slots__ = ("fingerprint", "held_tokens", "is_ready", "open", "prompt_tokens_per_step", "waiting_tokens")

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.is_ready = True
        self.open: dict[Attempt, None] = {}
        self.waiting_tokens = 0
        self.held_tokens = 0
        self.prompt_tokens_per_step = 0.0  # see `scheduling.mixed_routing.colocated_offer`


class Fleet:
    """Instances and their loads. Loads are exact and immediate, as in a live router that is alone."""

    def __init__(
        self,
        prefill: Iterable[SimulatedInstance],
        decode: Iterable[SimulatedInstance],
        colocated: Iterable[SimulatedInstance],
        router: RouterSpec,
        names: BlockNames | None = None,
    ) -> None:
        """`names`, if prompts share prefixes that prefill instances cache."""
        self._prefill = {instance.spec.instance_id: instance for instance in prefill}
        self._decode = {instance.spec.instance_id: instance for instance in decode}
        self._colocated = {instance.spec.instance_id: instance for instance in colocated}
        self._targets = [Targets(slo.ttft_s, slo.tpot_s) for slo in router.classes]
        self._names = names
        self._tracker = PrefixTracker(names.block_size, _MAX_TRACKED_BLOCKS) if names is not None else None
        self._prefill_book = PrefillBook(_SLACK_TOKENS)
        self._decode_book = DecodeBook()
        self._colocated_book = DecodeBook()
        self._loads: dict[str, _Load] = {}
        self._paces: dict[str, Pace] = {}  # of a mixed fleet
        self._last_offer: dict[str, int] = {}  # instance -> which choice between offers took it last
        self._num_offers = 0
        instances: list[SimulatedInstance] = [
            *self._prefill.values(),
            *self._decode.values(),
            *self._colocated.values(),
        ]
        for spec in (instance.spec for instance in instances):
            # Instances with equal fingerprints can exchange KV.
            is_bound = router.same_node_only and spec.role != "colocated"
            self._loads[spec.instance_id] = _Load(str(spec.node) if is_bound else "")
            if self._prefill and self._colocated:
                self._paces[spec.instance_id] = Pace(spec.cost, spec.max_batch_tokens, spec.max_batch, spec.policy)
        for name in self._loads:
            self._put(name)

    def choose_first(self, attempt: Attempt, slo_class: int) -> SimulatedInstance:
        """Where it begins: at a prefill or a colocated instance, whichever promises more (`scheduling.mixed_routing`).
        Prefers others than those to avoid. Raises UnavailableError or ContextLengthError."""
        if not self._colocated:
            return self._choose_prefill(attempt)
        if not self._prefill:
            return self._choose_colocated(attempt)
        offers = [offer for offer in (self._pair_offer(attempt), self._colocated_offer(attempt)) if offer is not None]
        offers = [offer for offer in offers if offer.instance_id not in attempt.avoid] or offers
        if not offers:  # whoever says that the request is not too long decides
            try:
                return self._choose_colocated(attempt)
            except ContextLengthError:
                return self._choose_prefill(attempt)
        targets = self._targets[slo_class] if self._targets else Targets()
        name = choose_offer(offers, targets, self._last_offer).require()
        self._num_offers += 1
        self._last_offer[name] = self._num_offers
        return self._choose_prefill(attempt) if name in self._prefill else self._choose_colocated(attempt)

    def choose_decode(self, attempt: Attempt) -> SimulatedInstance:
        """As `choose_first`."""
        fingerprint = self._loads[attempt.begun_on.spec.instance_id].fingerprint
        return self._decode[_least_loaded(self._decode_book, attempt, fingerprint)]

    def _choose_prefill(self, attempt: Attempt) -> SimulatedInstance:
        num_tokens, avoid, shared = attempt.num_tokens, attempt.avoid, self._shared(attempt)
        fingerprints = self._decode_book.fingerprints_for(num_tokens)
        name = self._prefill_book.pick(
            num_tokens=num_tokens, decode_fingerprints=fingerprints, holders=self._holders(shared), avoid=avoid
        )
        if name is None:
            choice = self._prefill_book.choose(num_tokens=num_tokens, decode_fingerprints=fingerprints, avoid=avoid)
            name = choice.require()
        instance = self._prefill[name]
        if self._tracker is not None and shared and instance.spec.prefix_cache:
            self._tracker.record(name, shared)
        return instance

    def _choose_colocated(self, attempt: Attempt) -> SimulatedInstance:
        """The one with most memory and the smallest batch, as among decode instances."""
        return self._colocated[_least_loaded(self._colocated_book, attempt, "")]

    def _pair_offer(self, attempt: Attempt) -> Offer | None:
        num_tokens, growth_tokens, avoid = attempt.num_tokens, attempt.growth_tokens, attempt.avoid
        prefill = self._prefill_book.peek(
            num_tokens=num_tokens,
            decode_fingerprints=self._decode_book.fingerprints_for(num_tokens),
            holders=self._holders(self._shared(attempt)),
            avoid=avoid,
        )
        if prefill is None:
            return None
        uncomputed_tokens, _, _, prefill_id = prefill.rank
        decode = self._decode_book.peek(
            num_tokens=num_tokens,
            growth_tokens=growth_tokens,
            fingerprint=self._loads[prefill_id].fingerprint,
            avoid=avoid,
        )
        assert decode is not None, "an instance is there for each of the fingerprints"
        decode_id = decode.rank[3]
        return pair_offer(
            prefill_id,
            uncomputed_tokens,
            self._paces[prefill_id],
            self._decode_book.views[decode_id],
            self._paces[decode_id],
            num_tokens=num_tokens,
            growth_tokens=growth_tokens,
        )

    def _colocated_offer(self, attempt: Attempt) -> Offer | None:
        num_tokens, growth_tokens = attempt.num_tokens, attempt.growth_tokens
        best = self._colocated_book.peek(
            num_tokens=num_tokens, growth_tokens=growth_tokens, fingerprint="", avoid=attempt.avoid
        )
        if best is None:
            return None
        instance_id = best.rank[3]
        load = self._loads[instance_id]
        return colocated_offer(
            self._colocated_book.views[instance_id],
            self._paces[instance_id],
            queued_tokens=load.waiting_tokens,
            prompt_tokens_per_step=load.prompt_tokens_per_step,
            num_tokens=num_tokens,
            growth_tokens=growth_tokens,
        )

    def _shared(self, attempt: Attempt) -> list[bytes]:
        """Names of the prompt's blocks that others have, too."""
        return self._names.shared(attempt.row) if self._names is not None else []

    def _holders(self, shared: list[bytes]) -> Holders:
        return self._tracker.holders(shared) if self._tracker is not None and shared else ()

    def lose(self, instance_id: str) -> list[Attempt]:
        """The instance is gone. Returns the attempts that were open there."""
        load = self._loads[instance_id]
        load.is_ready = False
        self._put(instance_id)
        if self._tracker is not None:
            self._tracker.forget(instance_id)
        return list(load.open)

    def found(self, instance_id: str) -> None:
        """The instance is back."""
        self._loads[instance_id].is_ready = True
        self._put(instance_id)

    def opened_prefill(self, instance_id: str, attempt: Attempt) -> None:
        load = self._loads[instance_id]
        load.open[attempt] = None
        attempt.waiting_tokens = attempt.num_tokens
        load.waiting_tokens += attempt.waiting_tokens
        self._put(instance_id)

    def computed(self, instance_id: str, attempt: Attempt, num_tokens: int) -> None:
        """So many of its tokens need not be waited for any more."""
        num_tokens = min(num_tokens, attempt.waiting_tokens)
        if num_tokens > 0:
            attempt.waiting_tokens -= num_tokens
            self._loads[instance_id].waiting_tokens -= num_tokens
            if attempt.colocated is None:  # the book of colocated ones does not count them
                self._put(instance_id)

    def opened_decode(self, instance_id: str, attempt: Attempt) -> None:
        load = self._loads[instance_id]
        load.open[attempt] = None
        load.held_tokens += attempt.request.max_total_tokens
        self._put(instance_id)

    def opened_colocated(self, instance_id: str, attempt: Attempt) -> None:
        load = self._loads[instance_id]
        attempt.waiting_tokens = attempt.num_tokens
        load.waiting_tokens += attempt.waiting_tokens
        load.prompt_tokens_per_step += attempt.prompt_tokens_per_step
        self.opened_decode(instance_id, attempt)

    def closed_prefill(self, instance_id: str, attempt: Attempt) -> bool:
        """False when it was closed before."""
        load = self._loads[instance_id]
        if attempt not in load.open:
            return False
        del load.open[attempt]
        if attempt.waiting_tokens > 0:
            load.waiting_tokens -= attempt.waiting_tokens
            self._put(instance_id)
        return True

    def closed_decode(self, instance_id: str, attempt: Attempt) -> bool:
        """Or colocated. False when it was closed before."""
        load = self._loads[instance_id]
        if attempt not in load.open:
            return False
        del load.open[attempt]
        load.held_tokens -= attempt.request.max_total_tokens
        if attempt.colocated is not None:
            load.waiting_tokens -= attempt.waiting_tokens
            attempt.waiting_tokens = 0
            # Sums of fractions: nothing may be left of their rounding.
            load.prompt_tokens_per_step -= attempt.prompt_tokens_per_step if load.open else load.prompt_tokens_per_step
        self._put(instance_id)
        return True

    def _put(self, instance_id: str) -> None:
        load = self._loads[instance_id]
        if (prefill := self._prefill.get(instance_id)) is not None:
            view = PrefillView(
                instance_id,
                load.fingerprint,
                load.is_ready,
                prefill.max_model_len,
                queued_tokens=load.waiting_tokens,
                running=len(load.open),
            )
            self._prefill_book.put(view)
            return
        book = self._decode_book if instance_id in self._decode else self._colocated_book
        decode = self._decode.get(instance_id) or self._colocated[instance_id]
        spec = decode.spec
        book.put(
            DecodeView(
                instance_id,
                load.fingerprint,
                load.is_ready,
                decode.max_model_len,
                spec.block_size,
                spec.num_blocks,
                free_blocks=spec.num_blocks - -(-load.held_tokens // spec.block_size),
                running=len(load.open),
            )
        )


def _least_loaded(book: DecodeBook, attempt: Attempt, fingerprint: str) -> str:
    num_tokens, growth_tokens, avoid = attempt.num_tokens, attempt.growth_tokens, attempt.avoid
    name = book.pick(num_tokens=num_tokens, growth_tokens=growth_tokens, fingerprint=fingerprint, avoid=avoid)
    if name is None:
        choice = book.choose(num_tokens=num_tokens, growth_tokens=growth_tokens, fingerprint=fingerprint, avoid=avoid)
        name = choice.require()
    return name
