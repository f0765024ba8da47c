"""The places of token units in a pool, and reads and writes at these places."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tandem.kv_transfer.reshard import places

_BY_UNIT = (0, 1, 3, 2, 4, 5)  # [layer, kv, head, block, unit, word]


class Places(NamedTuple):
    """Places of units in [layer, kv, block, head, unit, word], int64 [n] each. `units` None: units are whole blocks."""

    blocks: Tensor
    units: Tensor | None

    def some(self, which: slice) -> "Places":
        return Places(self.blocks[which], None if self.units is None else self.units[which])

    def minus(self, blocks: int) -> "Places":
        """The same places, with blocks counted from a later one."""
        return Places(self.blocks - blocks, self.units)


def unit_places(units: range, units_per_block: int, block_ids: Sequence[int], device: torch.device) -> Places:
    """The places of units of a sequence with the blocks `block_ids`."""
    positions, numbers = places(units, units_per_block)
    blocks = [block_ids[position] for position in positions]
    return Places(torch.tensor(blocks, device=device), torch.tensor(numbers, device=device))


def take(words: Tensor, at: Places) -> Tensor:
    """The words at these places: [layer, kv, n, head, unit, word] of whole blocks, else [layer, kv, head, n, word]."""
    if at.units is None:
        return words.index_select(2, at.blocks)
    return words.permute(_BY_UNIT)[:, :, :, at.blocks, at.units]


def put(words: Tensor, at: Places, values: Tensor) -> None:
    """Write `values`, of the shape that `take` returns."""
    if at.units is None:
        words.index_copy_(2, at.blocks, values)
    else:
        words.permute(_BY_UNIT)[:, :, :, at.blocks, at.units] = values
