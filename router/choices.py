"""Which instances a request goes to: the router's live load, put before the pure policy of `scheduling.routing`."""

from dataclasses import dataclass

from core.request import GenerationRequest
from core.session import Role
from router.fleet import Fleet
from router.instances import Instance
from scheduling.prefix_index import block_hashes
from scheduling.prefix_tracker import PrefixTracker
from scheduling.routing import Choice, DecodeView, PrefillView, choose_decode, choose_prefill


@dataclass(frozen=True, slots=True)
class Chosen:
    """An instance, and the comparison that it won."""

    instance: Instance
    choice: Choice


class LoadChooser:
    """Chooses among the instances that take work now.

    Both choices prefer others than `avoid`, and raise UnavailableError or ContextLengthError. `slack_tokens`: see
    `scheduling.routing.choose_prefill`. `max_tracked_blocks` bounds what is remembered of each instance's prefix cache.
    """

    def __init__(self, fleet: Fleet, *, slack_tokens: int = 4096, max_tracked_blocks: int = 65536) -> None:
        self._fleet = fleet
        self._slack_tokens = slack_tokens
        self._max_tracked_blocks = max_tracked_blocks
        self._trackers: dict[str, PrefixTracker] = {}  # by prefill instance
        self._rotation = 0

    def choose_prefill(self, request: GenerationRequest, avoid: frozenset[str]) -> Chosen:
        self._forget_gone()
        self._rotation += 1
        num_tokens = len(request.token_ids)
        usable = self._fleet.usable(Role.PREFILL)
        hashes = {
            block_size: block_hashes(request.token_ids, block_size, request.cache_salt)
            for block_size in {instance.status.block_size for instance in usable}
        }
        views = [self._prefill_view(instance, hashes[instance.status.block_size]) for instance in usable]
        fingerprints = {
            decode.status.fingerprint
            for decode in self._fleet.usable(Role.DECODE)
            if num_tokens < decode.capacity_tokens
        }

        def choose(views: list[PrefillView]) -> Choice:
            return choose_prefill(
                views,
                num_tokens=num_tokens,
                decode_fingerprints=fingerprints,
                rotation=self._rotation,
                slack_tokens=self._slack_tokens,
            )

        choice = choose([view for view in views if view.instance_id not in avoid])
        if choice.instance_id is None:
            choice = choose(views)
        if choice.instance_id is None:
            self._fleet.check_length(num_tokens)  # says better what is wrong: which role is missing, how much would fit
        instance_id = choice.require()
        instance = next(it for it in usable if it.instance_id == instance_id)
        self._tracker(instance).record(instance_id, hashes[instance.status.block_size])
        return Chosen(instance, choice)

    def choose_decode(self, request: GenerationRequest, prefill: Instance, avoid: frozenset[str]) -> Chosen:
        self._rotation += 1
        usable = self._fleet.usable(Role.DECODE)
        views = [_decode_view(instance) for instance in usable]

        def choose(views: list[DecodeView]) -> Choice:
            return choose_decode(
                views,
                num_tokens=len(request.token_ids),
                growth_tokens=request.sampling.max_tokens - request.num_output_tokens,
                fingerprint=prefill.status.fingerprint,
                rotation=self._rotation,
            )

        choice = choose([view for view in views if view.instance_id not in avoid])
        if choice.instance_id is None:
            choice = choose(views)
        instance_id = choice.require()
        return Chosen(next(it for it in usable if it.instance_id == instance_id), choice)

    def _prefill_view(self, instance: Instance, hashes: list[bytes]) -> PrefillView:
        return PrefillView(
            instance_id=instance.instance_id,
            fingerprint=instance.status.fingerprint,
            ready=True,
            max_model_len=instance.capacity_tokens,
            queued_tokens=instance.queued_tokens,
            running=instance.open_requests,
            cached_prefix_tokens=self._tracker(instance).matched_tokens(instance.instance_id, hashes),
        )

    def _tracker(self, instance: Instance) -> PrefixTracker:
        tracker = self._trackers.get(instance.instance_id)
        if tracker is None:
            tracker = PrefixTracker(instance.status.block_size, self._max_tracked_blocks)
            self._trackers[instance.instance_id] = tracker
        return tracker

    def _forget_gone(self) -> None:
        if len(self._trackers) > 0:
            registered = {instance.instance_id for instance in self._fleet.instances}
            for instance_id in self._trackers.keys() - registered:
                del self._trackers[instance_id]


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
