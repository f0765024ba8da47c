"""Leases on computed KV that waits for its reader. Every lease expires, so that a lost reader frees its blocks."""

from dataclasses import dataclass, replace

from tandem.core.errors import DuplicateRequestError
from tandem.scheduling.keyed_heap import KeyedHeap


@dataclass(frozen=True, slots=True)
class Lease:
    """The blocks `block_ids` stay unchanged until `expires_s`, on the holder's monotonic clock."""

    request_id: str
    epoch: int
    block_ids: tuple[int, ...]
    expires_s: float


class LeaseTable:
    """Leases by (request id, epoch). The table decides which leases are in force, and the caller frees the blocks of
    ended ones, so that the decision and the block pool can belong to different threads.

    hold --acknowledged in time--> ended        hold --expires_s reached--> ended, later acknowledgements refused
    `renew` moves `expires_s` of a lease that has not ended.

    A lease may end while a reader copies its blocks. The reader must discard its copy unless `acknowledge` succeeds:
    only then was the lease in force during the whole copy.
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
        """Blocks under lease; a block of two leases counts twice."""
        return self._num_blocks

    def block_tables(self) -> list[tuple[int, ...]]:
        return [lease.block_ids for lease in self._leases.values()]

    def hold(self, request_id: str, epoch: int, block_ids: list[int] | tuple[int, ...], expires_s: float) -> Lease:
        """Begin a lease on `block_ids`, which the caller keeps allocated until the lease has ended.

        Raises DuplicateRequestError if the attempt already has a lease.
        """
        key = (request_id, epoch)
        if key in self._leases:
            raise DuplicateRequestError("A request with this id is being served already.")
        lease = Lease(request_id, epoch, tuple(block_ids), expires_s)
        self._leases[key] = lease
        self._expiry.push(key, expires_s)
        self._num_blocks += len(lease.block_ids)
        return lease

    def renew(self, request_id: str, epoch: int, expires_s: float) -> bool:
        """Let the lease end at `expires_s` instead. False if there is no such lease."""
        key = (request_id, epoch)
        if (lease := self._leases.get(key)) is None:
            return False
        self._leases[key] = replace(lease, expires_s=expires_s)
        self._expiry.push(key, expires_s)
        return True

    def find(self, request_id: str, epoch: int, now_s: float) -> Lease | None:
        """The lease, if it is in force."""
        lease = self._leases.get((request_id, epoch))
        return lease if lease is not None and now_s < lease.expires_s else None

    def acknowledge(self, request_id: str, epoch: int, now_s: float) -> Lease | None:
        """The reader has a complete copy: end the lease and return it. None if there is no lease in force: the reader
        must discard its copy."""
        if self.find(request_id, epoch, now_s) is None:
            return None
        return self.drop(request_id, epoch)

    def drop(self, request_id: str, epoch: int) -> Lease | None:
        """End the lease now, for a cancelled request. None if there is no such lease."""
        lease = self._leases.pop((request_id, epoch), None)
        if lease is not None:
            self._expiry.discard((request_id, epoch))
            self._num_blocks -= len(lease.block_ids)
        return lease

    def expire(self, now_s: float) -> list[Lease]:
        """End all leases that have expired by `now_s`, and return them."""
        ended = [self._leases[key] for key in self._expiry.pop_until(now_s)]
        for lease in ended:
            self.drop(lease.request_id, lease.epoch)
        return ended
