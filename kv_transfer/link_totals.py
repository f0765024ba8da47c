"""How much went over the links to each peer so far."""

from dataclasses import replace

from tandem.core.session import LinkStats
from tandem.core.transfer import Transport

OTHER_PEERS = "other"  # `peer_id` of the sum over the peers without an entry
MIXED = "mixed"  # its `transport`


class LinkTotals:
    """Counters per peer; they outlive a link that failed and was made again. Lives on the event loop.

    Bounded: the `max_peers` peers that were linked last have an entry each. The counts of all others are summed in one
    more entry, so the sum over all entries never goes down.
    """

    def __init__(self, max_peers: int) -> None:
        self._max_peers = max_peers
        self._peers: dict[str, LinkStats] = {}  # the peer linked last is at the end
        self._other = _no_counts(OTHER_PEERS, MIXED)

    def linked(self, peer_id: str, transport: Transport) -> None:
        """A link to that peer was made."""
        stats = self._peers.pop(peer_id, None) or _no_counts(peer_id, transport.value)
        self._peers[peer_id] = replace(stats, transport=transport.value)
        if len(self._peers) > self._max_peers:
            self.forget(next(iter(self._peers)))

    def count(
        self, peer_id: str, *, transfers: int = 0, transfer_bytes: int = 0, transfer_s: float = 0.0, failures: int = 0
    ) -> None:
        """Add to that peer's counts."""
        stats = self._peers.get(peer_id, self._other)
        stats = replace(
            stats,
            transfers=stats.transfers + transfers,
            transfer_bytes=stats.transfer_bytes + transfer_bytes,
            transfer_s=stats.transfer_s + transfer_s,
            failures=stats.failures + failures,
        )
        if peer_id in self._peers:
            self._peers[peer_id] = stats
        else:
            self._other = stats

    def forget(self, peer_id: str) -> None:
        """That peer is gone: it has no entry of its own any more."""
        if (stats := self._peers.pop(peer_id, None)) is not None:
            self.count(
                peer_id,
                transfers=stats.transfers,
                transfer_bytes=stats.transfer_bytes,
                transfer_s=stats.transfer_s,
                failures=stats.failures,
            )

    def stats(self) -> tuple[LinkStats, ...]:
        """One entry a peer, and the sum of the others if there is anything in it."""
        other = self._other
        return (*self._peers.values(), *([other] if other.transfers or other.failures else []))


def _no_counts(peer_id: str, transport: str) -> LinkStats:
    return LinkStats(peer_id, transport, transfers=0, transfer_bytes=0, transfer_s=0.0, failures=0)
