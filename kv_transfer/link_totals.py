"""Totals of the transfers over the links to each peer."""

from dataclasses import replace

from tandem.core.kv_codec import KvCodec
from tandem.core.session import LinkStats
from tandem.core.transfer import Transport

OTHER_PEERS = "other"
UNKNOWN_TRANSPORT = "other"  # of a transfer that fails after its peer was forgotten


class LinkTotals:
    """Counters per peer, which outlive a link that failed and was made again. Used on the event loop.

    Bounded: the `max_peers` peers that were linked last have an entry each. The counts of all others are summed in one
    more entry for each transport (peer "other"), so neither the sum over all entries nor that of one transport ever
    goes down.
    """

    def __init__(self, max_peers: int) -> None:
        self._max_peers = max_peers
        self._peers: dict[str, LinkStats] = {}  # the peer linked last is at the end
        self._others: dict[str, LinkStats] = {}  # by transport

    def linked(self, peer_id: str, transport: Transport, codec: KvCodec = KvCodec.NONE) -> None:
        """A link to that peer was made. Counts of an earlier transport move to the entry of other peers."""
        stats = self._peers.pop(peer_id, None)
        if stats is not None and stats.transport != transport.value:
            self._add_to_others(stats)
            stats = None
        self._peers[peer_id] = replace(stats or LinkStats(peer_id, transport.value, 0, 0, 0.0, 0), codec=codec.value)
        if len(self._peers) > self._max_peers:
            self.forget(next(iter(self._peers)))

    def add(
        self,
        peer_id: str,
        transfers: int = 0,
        nbytes: int = 0,
        seconds: float = 0.0,
        failures: int = 0,
        streamed_bytes: int = 0,
        wire_bytes: int = 0,
    ) -> None:
        """Add to that peer's counts."""
        more = LinkStats(peer_id, UNKNOWN_TRANSPORT, transfers, nbytes, seconds, failures, streamed_bytes, wire_bytes)
        if peer_id in self._peers:
            self._peers[peer_id] = _sum(self._peers[peer_id], more)
        else:
            self._add_to_others(more)

    def forget(self, peer_id: str) -> None:
        """The peer is gone: its counts move to the entry of other peers."""
        if stats := self._peers.pop(peer_id, None):
            self._add_to_others(stats)

    def stats(self) -> tuple[LinkStats, ...]:
        """One entry for each peer, and the sums of all others."""
        return (*self._peers.values(), *self._others.values())

    def _add_to_others(self, stats: LinkStats) -> None:
        if stats.transfers or stats.failures:
            others = self._others.get(stats.transport) or LinkStats(OTHER_PEERS, stats.transport, 0, 0, 0.0, 0)
            self._others[stats.transport] = _sum(others, stats)


def _sum(stats: LinkStats, more: LinkStats) -> LinkStats:
    """Peer, transport and codec of `stats`, with the counts of both."""
    return replace(
        stats,
        transfers=stats.transfers + more.transfers,
        transfer_bytes=stats.transfer_bytes + more.transfer_bytes,
        transfer_s=stats.transfer_s + more.transfer_s,
        failures=stats.failures + more.failures,
        streamed_bytes=stats.streamed_bytes + more.streamed_bytes,
        wire_bytes=stats.wire_bytes + more.wire_bytes,
    )
