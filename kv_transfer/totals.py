"""What went over the links to one peer so far."""

from dataclasses import dataclass

from tandem.core.session import LinkStats
from tandem.core.transfer import Transport


@dataclass(slots=True)
class LinkTotals:
    """Counters of one peer; they outlive a link that failed and was made again. Owned by the event loop."""

    peer_id: str
    transport: Transport
    transfers: int = 0
    transfer_bytes: int = 0
    transfer_s: float = 0.0
    failures: int = 0

    def count(self, nbytes: int, seconds: float) -> None:
        self.transfers += 1
        self.transfer_bytes += nbytes
        self.transfer_s += seconds

    def stats(self) -> LinkStats:
        return LinkStats(
            self.peer_id, self.transport.value, self.transfers, self.transfer_bytes, self.transfer_s, self.failures
        )
