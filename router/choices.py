"""Which instances a request goes to: the router's live load, put before the pure policy of `scheduling.routing`."""

from dataclasses import dataclass

from tandem.core.request import GenerationRequest
from tandem.core.session import Role
from tandem.router.fleet import Fleet
from tandem.router.instances import Instance
from tandem.scheduling.decode_book import DecodeBook
from tandem.scheduling.prefill_book import PrefillBook
from tandem.scheduling.prefix_index import block_hashes
from tandem.scheduling.prefix_tracker import PrefixTracker
from tandem.scheduling.routing import Choice, DecodeView, PrefillView


@dataclass(frozen=True, slots=True)
class Chosen:
    """An instance, and the comparison that it won."""

    instance: Instance
    choice: Choice


class LoadChooser:
    """Chooses among the instances that take work now, at a price that hardly depends on how many they are.

    Both choices prefer others than `avoid`, and raise UnavailableError or ContextLengthError. `slack_tokens`: see
    `scheduling.routing.choose_prefill`. `max_tracked_blocks` bounds what is remembered of each instance's prefix cache.
    """

    def __init__(self, fleet: Fleet, *, slack_tokens: int = 4096, max_tracked_blocks: int = 65536) -> None:
        self._fleet = fleet
        self._max_tracked_blocks = max_tracked_blocks
        self._prefills = PrefillBook(slack_tokens)
        self._decodes = DecodeBook()
        self._trackers: dict[int, PrefixTracker] = {}  # by block size: it determines the blocks' names
        self._stale: set[str] = set()  # instances of which the books do not know the last change yet
        fleet.watch(lambda instance: self._stale.add(instance.instance_id))

    def choose_prefill(self, request: GenerationRequest, avoid: frozenset[str]) -> Chosen:
        self._refresh()
        num_tokens = len(request.token_ids)
        names = {size: block_hashes(request.token_ids, size, request.cache_salt) for size in self._trackers}
        holders = [found for size, tracker in self._trackers.items() for found in tracker.holders(names[size])]
        if len(self._trackers) > 1:
            holders.sort(key=lambda found: found[0], reverse=True)
        choice = self._prefills.choose(
            num_tokens=num_tokens,
            decode_fingerprints=self._decodes.fingerprints_for(num_tokens),
            holders=holders,
            avoid=avoid,
        )
        if choice.instance_id is None:
            self._fleet.check_length(num_tokens)  # says better what is wrong: which role is missing, how much would fit
        chosen = self._chosen(choice)
        block_size = chosen.instance.status.block_size
        self._trackers[block_size].record(chosen.instance.instance_id, names[block_size])
        return chosen

    def choose_decode(self, request: GenerationRequest, prefill: Instance, avoid: frozenset[str]) -> Chosen:
        self._refresh()
        choice = self._decodes.choose(
            num_tokens=len(request.token_ids),
            growth_tokens=request.sampling.max_tokens - request.num_output_tokens,
            fingerprint=prefill.status.fingerprint,
            avoid=avoid,
        )
        return self._chosen(choice)

    def _chosen(self, choice: Choice) -> Chosen:
        instance = self._fleet.get(choice.require())
        assert instance is not None, "the books know an instance that is gone"
        return Chosen(instance, choice)

    def _refresh(self) -> None:
        """Bring the books up to date."""
        for instance_id in self._stale:
            instance = self._fleet.get(instance_id)
            if instance is None:
                for tracker in self._trackers.values():
                    tracker.forget(instance_id)
            role = instance.role if instance is not None and instance.accepts_work else None
            if instance is not None and role is Role.PREFILL:
                size = instance.status.block_size
                if size not in self._trackers:
                    self._trackers[size] = PrefixTracker(size, self._max_tracked_blocks)
                self._prefills.put(_prefill_view(instance))
            else:
                self._prefills.remove(instance_id)
            if instance is not None and role is Role.DECODE:
                self._decodes.put(_decode_view(instance))
            else:
                self._decodes.remove(instance_id)
        self._stale.clear()


def _prefill_view(instance: Instance) -> PrefillView:
    return PrefillView(
        instance_id=instance.instance_id,
        fingerprint=instance.status.fingerprint,
        ready=True,
        max_model_len=instance.capacity_tokens,
        queued_tokens=instance.queued_tokens,
        running=instance.open_requests,
    )


def _decode_view(instance: Instance) -> DecodeView:
    """What this router has open there, or what the instance reported: whichever is more. The first is exact and
    immediate, the second knows of other routers."""
    status = instance.status
    blocks = status.blocks
    used_blocks = blocks.total - blocks.free - blocks.cached
    waiting_tokens = status.waiting_tokens
    own_blocks = -(-instance.held_tokens // status.block_size)
    if own_blocks > used_blocks + waiting_tokens // status.block_size:
        used_blocks, waiting_tokens = own_blocks, 0
    return DecodeView(
        instance_id=instance.instance_id,
        fingerprint=status.fingerprint,
        ready=True,
        max_model_len=instance.capacity_tokens,
        block_size=status.block_size,
        total_blocks=max(1, blocks.total),
        free_blocks=blocks.total - used_blocks,
        running=max(status.running_requests, instance.open_requests - status.waiting_requests),
        waiting=status.waiting_requests,
        waiting_tokens=waiting_tokens,
    )
