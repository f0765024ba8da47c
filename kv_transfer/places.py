"""Where units of tokens are in a pool, and reads and writes there."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tandem.kv_transfer.reshard import places

_BY_UNIT = (0, 1, 3, 2, 4, 5)  # [layer, kv, head, block, unit, word]


class Places(NamedTuple):
    """Where units of tokens are in [layer, kv, block, head, unit, word]. `units` None: they are whole blocks."""

    blocks: Tensor
    units: Tensor | None

    def some(self, which: slice) -> "Places":
        return Places(self.blocks[which], None if self.units is None else self.units[which])

    def minus(self, blocks: int) -> "Places":
        """As counted from a later block."""
        return Places(self.blocks - blocks, self.units)


def unit_places(units: range, units_per_block: int, block_ids: Sequence[int], device: torch.device) -> Places:
    """Where units of a sequence are in the pool whose blocks `block_ids` it has."""
    positions, numbers = places(units, units_per_block)
    blocks = [block_ids[position] for position in positions]
    return Places(torch.tensor(blocks, device=device), torch.tensor(numbers, device=device))


def take(words: Tensor, at: Places) -> Tensor:
    if at.units is None:
        return words.index_select(2, at.blocks)
    return words.permute(_BY_UNIT)[:, :, :, at.blocks, at.units]


def put(words: Tensor, at: Places, values: Tensor) -> None:
    """`values` has the shape that `take` returns."""
    if at.units is None:
        words.index_copy_(2, at.blocks, values)
    else:
        words.permute(_BY_UNIT)[:, :, :, at.blocks, at.units] = values
