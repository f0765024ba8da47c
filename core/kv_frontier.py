"""How much of an attempt's KV is computed, and what one state has beyond an earlier one. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
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
class StageFrontier:
    """Whole blocks of an attempt of which one pipeline stage has computed its layers. Those before the stage's current
    chunk of the prompt have all of them, those of the chunk have the layers that the step has computed so far:

        num_layers  +--------------+
                    |              |
            layers  |              +---------+
                    |   computed   |         |
                    +--------------+---------+-----------
                    0            blocks  next_blocks        positions in the attempt's list of blocks
    """

    blocks: int = 0
    next_blocks: int = 0
    layers: int = 0
    num_layers: int = 0

    @property
    def is_valid(self) -> bool:
        return 0 <= self.blocks <= self.next_blocks and 0 <= self.layers <= self.num_layers

    def layers_of(self, block: int) -> int:
        """How many of the stage's layers of that block are computed."""
        if block < self.blocks:
            return self.num_layers
        return self.layers if block < self.next_blocks else 0


@dataclass(frozen=True, slots=True)
class KvFrontier:
    """The computed part of an attempt's KV, for the pipeline stages whose progress is known: the first one, and `later`
    ones, which are behind it. Layers count from each stage's first.

    `allocation` counts how often the attempt was given blocks: a preemption takes them away, and what was read under an
    earlier allocation is void. An attempt without blocks has allocation 0.
    """

    allocation: int = 0
    blocks: int = 0
    next_blocks: int = 0
    layers: int = 0
    num_layers: int = 0
    later: tuple[StageFrontier, ...] = ()

    @classmethod
    def finished(cls, allocation: int, num_blocks: int, num_layers: int) -> "KvFrontier":
        """Everything is computed."""
        return cls(allocation, num_blocks, num_blocks, 0, num_layers)

    @property
    def stages(self) -> tuple[StageFrontier, ...]:
        return (StageFrontier(self.blocks, self.next_blocks, self.layers, self.num_layers), *self.later)

    @property
    def is_valid(self) -> bool:
        return self.allocation >= 0 and all(stage.is_valid for stage in self.stages)

    @property
    def known_layers(self) -> int:
        """Number of layers of all stages whose progress is known."""
        return sum(stage.num_layers for stage in self.stages)

    def covers(self, chunk: TransferChunk) -> bool:
        """Whether all of the chunk is computed."""
        if not chunk.num_layer_blocks:
            return True
        last, wanted = chunk.blocks.stop - 1, chunk.layers
        return wanted.stop <= self.known_layers and all(
            min(wanted.stop, begin + stage.num_layers) <= begin + stage.layers_of(last)
            for begin, stage in self._placed()
            if wanted.start < begin + stage.num_layers and begin < wanted.stop
        )

    def beyond(self, earlier: "KvFrontier") -> list[TransferChunk]:
        """The KV that is computed here and not in `earlier`, as disjoint rectangles: at most four for each stage."""
        limits = (limit for stage in (*self.stages, *earlier.stages) for limit in (stage.blocks, stage.next_blocks))
        blocks = pairwise(sorted({0, *limits}))
        borders = {begin for frontier in (self, earlier) for begin, _ in frontier._placed()}
        layers = pairwise(sorted({*borders, self.known_layers, earlier.known_layers}))
        chunks = []
        for (bottom, top), (begin, end) in product(layers, blocks):
            known, now = (bottom + frontier._computed(bottom, top, begin) for frontier in (earlier, self))
            if now > known:
                chunks.append(TransferChunk(range(known, now), range(begin, end)))
        return chunks

    def _placed(self) -> Iterator[tuple[int, StageFrontier]]:
        """Each stage with its first layer."""
        begins = accumulate((stage.num_layers for stage in self.stages), initial=0)
        return zip(begins, self.stages, strict=False)

    def _computed(self, bottom: int, top: int, block: int) -> int:
        """How many of the layers [bottom, top), which are of one stage, are computed of that block."""
        for begin, stage in self._placed():
            if begin <= bottom < begin + stage.num_layers:
                return max(0, min(top, begin + stage.layers_of(block)) - bottom)
        return 0
