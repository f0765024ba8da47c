"""How much went over the links to each peer so far."""

from dataclasses import replace

from tandem.core.session import LinkStats
from tandem.core.transfer import Transport


class LinkTotals:
    """Counters per peer; they outlive a link that failed and was made again. Lives on the event loop.

    Bounded: the `max_peers` peers that were linked last have an entry each. The counts of all others are summed in one
    more entry (peer "other", transport "mixed"), so the sum over all entries never goes down.
    """

    def __init__(self, max_peers: int) -> None:
        self._max_peers = max_peers
        self._peers: dict[str, LinkStats] = {}  # the peer linked last is at the end
        self._other = LinkStats("other", "mixed", 0, 0, 0.0, 0)

    def linked(self, peer_id: str, transport: Transport) -> None:
        """A link to that peer was made."""
        stats = self._peers.pop(peer_id, None) or LinkStats(peer_id, "", 0, 0, 0.0, 0)
        self._peers[peer_id] = replace(stats, transport=transport.value)
        if len(self._peers) > self._max_peers:
            self.forget(next(iter(self._peers)))

    def add(self, peer_id: str, transfers: int = 0, nbytes: int = 0, seconds: float = 0.0, failures: int = 0) -> None:
        """Add to that peer's counts."""
        old = self._peers.get(peer_id, self._other)
        new = replace(
            old,
            transfers=old.transfers + transfers,
            transfer_bytes=old.transfer_bytes + nbytes,
            transfer_s=old.transfer_s + seconds,
            failures=old.failures + failures,
        )
        if old is self._other:
            self._other = new
        else:
            self._peers[peer_id] = new

    def forget(self, peer_id: str) -> None:
        """That peer is gone: it has no entry of its own any more."""
        if old := self._peers.pop(peer_id, None):
            self.add(peer_id, old.transfers, old.transfer_bytes, old.transfer_s, old.failures)

    def stats(self) -> tuple[LinkStats, ...]:
        """One entry a peer, and the sum of the others if anything was counted."""
        other = self._other
        return (*self._peers.values(), *([other] if other.transfers or other.failures else []))
