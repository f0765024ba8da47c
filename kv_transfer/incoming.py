"""The state of one transfer during its fetch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tandem.core.kv_frontier import KvFrontier
from tandem.core.transfer import Transport
from tandem.kv_transfer.fence import WriteFence


@dataclass(slots=True)
class IncomingKv:
    """Where the KV of a transfer goes, and what has arrived. All writes into `block_ids` are inside of `fence`."""

    num_tokens: int
    block_ids: Sequence[int]
    fence: WriteFence = field(default_factory=WriteFence)
    known: KvFrontier = field(default_factory=KvFrontier)
    num_streamed: int = 0  # blocks of one layer of the source
    wire_bytes: int = 0  # received so far, also in vain
    streaming_s: float = 0.0  # in which these bytes moved
    first_s: float | None = None  # when the turn of the first ones came
    transport: Transport | None = None  # of the last ones
    is_acknowledged: bool = False

    def known_of(self, allocation: int) -> KvFrontier:
        """The KV that has arrived and is still valid under `allocation`."""
        return self.known if self.known.allocation == allocation else KvFrontier()

    async def restart(self) -> None:
        """Begin anew: nothing has arrived, and a transfer that still runs writes nothing any more."""
        await self.fence.close()
        self.fence = WriteFence()
        self.known, self.num_streamed, self.first_s = KvFrontier(), 0, None
