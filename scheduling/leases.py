"""Computed KV that waits to be fetched. Each lease ends, so that a reader that is gone frees its blocks."""

from dataclasses import dataclass

from tandem.core.errors import DuplicateRequestError
from tandem.scheduling.keyed_heap import KeyedHeap


@dataclass(frozen=True, slots=True)
class Lease:
    """`block_ids` stay unchanged until `expires_s`, on the holder's monotonic clock."""

    request_id: str
    epoch: int
    block_ids: tuple[int, ...]
    expires_s: float


class LeaseTable:
    """Leases by (request id, epoch). It decides who still has a claim; freeing the blocks of an ended lease is up to
    the caller, so that the decision and the block pool may live on different threads.

    hold --acknowledged in time--> ended        hold --expires_s reached--> ended, later acknowledgements refused

    A reader may copy blocks while their lease ends. It cannot know, so it must discard what it read unless the
    acknowledgement is accepted: `acknowledge` says yes only while the content was certainly still there.
    """

    __slots__ = ("_expiry", "_leases", "_num_blocks")

    def __init__(self) -> None:
        self._leases: dict[tuple[str, int], Lease] = {}
        self._expiry: KeyedHeap[tuple[str, int]] = KeyedHeap()
        self._num_blocks = 0

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def num_blocks(self) -> int:
        """Blocks under lease; one that two leases share counts twice."""
        return self._num_blocks

    def block_tables(self) -> list[tuple[int, ...]]:
        return [lease.block_ids for lease in self._leases.values()]

    def hold(self, request_id: str, epoch: int, block_ids: list[int] | tuple[int, ...], expires_s: float) -> Lease:
        """Begin a lease on `block_ids`, which the caller keeps allocated until it has ended.

        Raises DuplicateRequestError if that attempt is under lease already.
        """
        key = (request_id, epoch)
        if key in self._leases:
            raise DuplicateRequestError("A request with this id is being served already.")
        lease = Lease(request_id, epoch, tuple(block_ids), expires_s)
        self._leases[key] = lease
        self._expiry.push(key, expires_s)
        self._num_blocks += len(lease.block_ids)
        return lease

    def find(self, request_id: str, epoch: int, now_s: float) -> Lease | None:
        """The lease, if it is still in force."""
        lease = self._leases.get((request_id, epoch))
        return lease if lease is not None and now_s < lease.expires_s else None

    def acknowledge(self, request_id: str, epoch: int, now_s: float) -> Lease | None:
        """The reader has everything: end the lease and return it. None when stale or expired: the reader must
        discard."""
        if self.find(request_id, epoch, now_s) is None:
            return None
        return self.drop(request_id, epoch)

    def drop(self, request_id: str, epoch: int) -> Lease | None:
        """End it now: the request was cancelled. None when there is no such lease."""
        lease = self._leases.pop((request_id, epoch), None)
        if lease is not None:
            self._expiry.discard((request_id, epoch))
            self._num_blocks -= len(lease.block_ids)
        return lease

    def expire(self, now_s: float) -> list[Lease]:
        """End all leases that are over by `now_s`, and return them."""
        ended = [self._leases[key] for key in self._expiry.pop_until(now_s)]
        for lease in ended:
            self.drop(lease.request_id, lease.epoch)
        return ended
