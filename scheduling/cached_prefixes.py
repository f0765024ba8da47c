"""The router's estimate of which instances have how much of a prompt in their prefix caches."""

from tandem.core.session import Role
from tandem.scheduling.known_instance import KnownInstance
from tandem.scheduling.prefill_index import Holders
from tandem.scheduling.prefix_tracker import PrefixTracker
from tandem.scheduling.routed_request import RoutedRequest


class CachedPrefixes:
    """One `PrefixTracker` for each block size, because the names of blocks depend on it."""

    __slots__ = ("_max_tracked_blocks", "_tracker_type", "_trackers")

    def __init__(self, tracker_type: type[PrefixTracker], max_tracked_blocks: int) -> None:
        """`tracker_type`: for block names that are not hashes. `max_tracked_blocks`: for each instance."""
        self._tracker_type = tracker_type
        self._max_tracked_blocks = max_tracked_blocks
        self._trackers: dict[int, PrefixTracker] = {}

    def record(self, request: RoutedRequest, instance: KnownInstance) -> None:
        """The instance computes the prompt, and may cache it. No record of decode instances, which compute prompts only
        while no other instance does."""
        if not request.has_block_names or instance.role is Role.DECODE:
            return
        block_size, num_blocks = instance.status.block_size, instance.status.blocks.total
        tracker = self._trackers.get(block_size)
        if tracker is None:
            tracker = self._trackers[block_size] = self._tracker_type(block_size, self._max_tracked_blocks)
        tracker.record(instance.instance_id, request.block_names(block_size), num_blocks)

    def tokens(self, request: RoutedRequest, instance: KnownInstance) -> int:
        """Leading tokens of the prompt that the instance has cached. The last token is always computed."""
        block_size = instance.status.block_size
        tracker = self._trackers.get(block_size)
        if tracker is None or not (names := request.block_names(block_size)):
            return 0
        return min(tracker.matched_tokens(instance.instance_id, names), request.num_tokens - 1)

    def holders(self, request: RoutedRequest) -> Holders:
        """The instances that have leading tokens of the prompt cached, most tokens first."""
        if not request.has_block_names:
            return ()
        found = [
            each for size, tracker in self._trackers.items() for each in tracker.holders(request.block_names(size))
        ]
        if len(self._trackers) > 1:
            found.sort(key=lambda each: each[0], reverse=True)
        return found

    def forget(self, instance_id: str) -> None:
        """The instance is gone."""
        for tracker in self._trackers.values():
            tracker.forget(instance_id)
