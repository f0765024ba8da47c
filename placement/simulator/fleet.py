"""The router's knowledge of load, in `scheduling.load_book`'s order: which instances a request goes to."""

from collections.abc import Iterable

from core.request import GenerationRequest
from placement.simulator.attempt import Attempt
from placement.simulator.colocated import ColocatedInstance
from placement.simulator.decode import DecodeInstance
from placement.simulator.prefill import PrefillInstance
from placement.simulator.prefixes import BlockNames
from scheduling.load_book import DecodeBook, PrefillBook
from scheduling.prefix_tracker import PrefixTracker
from scheduling.routing import DecodeView, PrefillView

# As the live router's.
_SLACK_TOKENS = 4096
_MAX_TRACKED_BLOCKS = 65536

Instance = PrefillInstance | DecodeInstance | ColocatedInstance


class _Load:
    """What the router has sent to one instance and not yet seen finished."""

    __slots__ = ("fingerprint", "held_tokens", "is_ready", "open", "waiting_tokens")

    def __init__(self, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.is_ready = True
        self.open: dict[Attempt, None] = {}
        self.waiting_tokens = 0
        self.held_tokens = 0


class Fleet:
    """Instances and their loads. Loads are exact and immediate, as in a live router that is alone."""

    def __init__(
        self,
        prefill: Iterable[PrefillInstance] = (),
        decode: Iterable[DecodeInstance] = (),
        colocated: Iterable[ColocatedInstance] = (),
        *,
        names: BlockNames | None = None,
        same_node_only: bool = False,
    ) -> None:
        """`names`, if prompts share prefixes that prefill instances cache."""
        self._prefill = {instance.spec.instance_id: instance for instance in prefill}
        self._decode = {instance.spec.instance_id: instance for instance in decode}
        self._colocated = {instance.spec.instance_id: instance for instance in colocated}
        self._names = names
        self._tracker = PrefixTracker(names.block_size, _MAX_TRACKED_BLOCKS) if names is not None else None
        self._prefill_book = PrefillBook(_SLACK_TOKENS)
        self._decode_book = DecodeBook()
        self._loads: dict[str, _Load] = {}
        instances: list[Instance] = [*self._prefill.values(), *self._decode.values(), *self._colocated.values()]
        for spec in (instance.spec for instance in instances):
            # Instances with equal fingerprints can exchange KV.
            is_bound = same_node_only and spec.role != "colocated"
            self._loads[spec.instance_id] = _Load(str(spec.node) if is_bound else "")
        for name in self._loads:
            self._put(name)

    @property
    def is_colocated(self) -> bool:
        """Whether its instances serve both phases."""
        return bool(self._colocated)

    def choose_prefill(self, row: int, request: GenerationRequest, avoid: frozenset[str]) -> PrefillInstance:
        """Prefers others than `avoid`. Raises UnavailableError or ContextLengthError."""
        num_tokens = len(request.token_ids)
        fingerprints = self._decode_book.fingerprints_for(num_tokens)
        shared = self._names.shared(row) if self._names is not None else []
        holders = self._tracker.holders(shared) if self._tracker is not None and shared else ()
        name = self._prefill_book.pick(
            num_tokens=num_tokens, decode_fingerprints=fingerprints, holders=holders, avoid=avoid
        )
        if name is None:
            choice = self._prefill_book.choose(num_tokens=num_tokens, decode_fingerprints=fingerprints, avoid=avoid)
            name = choice.require()
        instance = self._prefill[name]
        if self._tracker is not None and shared and instance.spec.prefix_cache:
            self._tracker.record(name, shared)
        return instance

    def choose_decode(self, request: GenerationRequest, prefill: str, avoid: frozenset[str]) -> DecodeInstance:
        """As `choose_prefill`."""
        return self._decode[self._least_loaded(request, self._loads[prefill].fingerprint, avoid)]

    def choose_colocated(self, request: GenerationRequest, avoid: frozenset[str]) -> ColocatedInstance:
        """As `choose_prefill`; the one with most memory and the smallest batch, as among decode instances."""
        return self._colocated[self._least_loaded(request, "", avoid)]

    def _least_loaded(self, request: GenerationRequest, fingerprint: str, avoid: frozenset[str]) -> str:
        num_tokens = len(request.token_ids)
        growth_tokens = request.sampling.max_tokens - request.num_output_tokens
        name = self._decode_book.pick(
            num_tokens=num_tokens, growth_tokens=growth_tokens, fingerprint=fingerprint, avoid=avoid
        )
        if name is None:
            choice = self._decode_book.choose(
                num_tokens=num_tokens, growth_tokens=growth_tokens, fingerprint=fingerprint, avoid=avoid
            )
            name = choice.require()
        return name

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
        attempt.waiting_tokens = len(attempt.request.token_ids)
        load.waiting_tokens += attempt.waiting_tokens
        self._put(instance_id)

    def computed(self, instance_id: str, attempt: Attempt, num_tokens: int) -> None:
        """So many of its tokens need not be waited for any more."""
        num_tokens = min(num_tokens, attempt.waiting_tokens)
        if num_tokens > 0:
            attempt.waiting_tokens -= num_tokens
            self._loads[instance_id].waiting_tokens -= num_tokens
            self._put(instance_id)

    def opened_decode(self, instance_id: str, attempt: Attempt) -> None:
        """Or colocated."""
        load = self._loads[instance_id]
        load.open[attempt] = None
        load.held_tokens += attempt.request.max_total_tokens
        self._put(instance_id)

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
        """False when it was closed before."""
        load = self._loads[instance_id]
        if attempt not in load.open:
            return False
        del load.open[attempt]
        load.held_tokens -= attempt.request.max_total_tokens
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
        decode = self._decode.get(instance_id) or self._colocated[instance_id]
        spec = decode.spec
        self._decode_book.put(
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
