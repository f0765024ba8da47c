"""How much of an attempt's KV is computed, and what one state has beyond an earlier one. Pure."""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple


class TransferChunk(NamedTuple):
    """A rectangle of a transfer: layers, and positions in the attempt's list of blocks.

    What is streamed at once is a few of these, with the layers of the model. What is sent as one message is one, with
    the layers of one rank's pool.
    """

    layers: range
    blocks: range

    @property
    def num_layer_blocks(self) -> int:
        """How many times one block of one layer."""
        return len(self.layers) * len(self.blocks)


@dataclass(frozen=True, slots=True)
class KvFrontier:
    """Whole blocks of an attempt that are computed. Those before the current chunk of the prompt have all layers, those
    of the chunk have the layers that the step has computed so far:

        num_layers  +--------------+
                    |              |
            layers  |              +---------+
                    |   computed   |         |
                    +--------------+---------+-----------
                    0            blocks  next_blocks        positions in the attempt's list of blocks

    `num_layers` are the layers whose progress is known, counted from the model's first: those of the first pipeline
    stage. `allocation` counts how often the attempt was given blocks: a preemption takes them away, and what was read
    under an earlier allocation is void. An attempt without blocks has allocation 0.
    """

    allocation: int = 0
    blocks: int = 0
    next_blocks: int = 0
    layers: int = 0
    num_layers: int = 0

    @classmethod
    def finished(cls, allocation: int, num_blocks: int, num_layers: int) -> "KvFrontier":
        """Everything is computed."""
        return cls(allocation, num_blocks, num_blocks, 0, num_layers)

    @property
    def is_valid(self) -> bool:
        return 0 <= self.blocks <= self.next_blocks and 0 <= self.layers <= self.num_layers and self.allocation >= 0

    def layers_of(self, block: int) -> int:
        """How many layers of that block are computed."""
        if block < self.blocks:
            return self.num_layers
        return self.layers if block < self.next_blocks else 0

    def covers(self, chunk: TransferChunk) -> bool:
        """Whether all of the chunk is computed."""
        return not chunk.num_layer_blocks or chunk.layers.stop <= self.layers_of(chunk.blocks.stop - 1)

    def beyond(self, earlier: "KvFrontier") -> list[TransferChunk]:
        """What is computed now and was not earlier: at most four rectangles that do not overlap."""
        limits = sorted({0, earlier.blocks, earlier.next_blocks, self.blocks, self.next_blocks})
        chunks = [
            TransferChunk(range(earlier.layers_of(begin), self.layers_of(begin)), range(begin, end))
            for begin, end in pairwise(limits)
        ]
        return [chunk for chunk in chunks if chunk.layers]
