"""How long KV takes between instances of two shapes, measured beside a transfer between two instances of one rank."""

from collections.abc import Sequence

from pydantic import Field

from tandem.core.frozen_model import FrozenModel
from tandem.core.parallel import ParallelShape
from tandem.placement.costs.rank_messages import MessageCost, MessageTime


class KvShape(FrozenModel):
    """How an instance divides KV over its ranks and blocks."""

    tp: int = Field(default=1, ge=1)
    pp: int = Field(default=1, ge=1)
    block_size: int = Field(default=16, ge=1)

    @property
    def shape(self) -> ParallelShape:
        return ParallelShape(self.tp, self.pp)

    def __str__(self) -> str:
        return f"{self.shape} in blocks of {self.block_size}"


class KvTransfer(FrozenModel):
    """From the manifest to the acknowledgement, on an idle machine."""

    source: KvShape
    destination: KvShape
    cost: MessageCost
    times: tuple[MessageTime, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Between two instances of one rank with equal blocks: what the others are compared with."""
        return self.source == self.destination and self.source.shape.num_ranks == 1


class Resharding(FrozenModel):
    """What a transfer takes more than a plain one: `extra_s`, and `factor` times as long for each byte."""

    extra_s: float = Field(ge=0)
    factor: float = Field(gt=0)


ShapePair = tuple[ParallelShape, ParallelShape]
"""(source, destination)."""


def resharding_of(transfers: Sequence[KvTransfer], block_size: int) -> dict[ShapePair, Resharding]:
    """Of the pairs that were measured with blocks of `block_size` on both sides; empty if no plain transfer was."""
    fitting = [one for one in transfers if one.source.block_size == one.destination.block_size == block_size]
    plain = next((one.cost for one in fitting if one.is_plain), None)
    if plain is None:
        return {}
    return {
        (one.source.shape, one.destination.shape): Resharding(
            extra_s=max(0.0, one.cost.latency_s - plain.latency_s),
            factor=plain.bytes_per_s / one.cost.bytes_per_s,
        )
        for one in fitting
    }
