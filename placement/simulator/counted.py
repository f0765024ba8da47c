"""Sequences and blocks without content: the schedulers' bookkeeping at the price of counting.

Simulated tokens have no values, and where no prefix is shared it does not matter which block is whose. The schedulers
see the same numbers as live.
"""

from typing import cast

from tandem.core.request import GenerationRequest, SamplingParams
from tandem.core.request_slo import RequestSlo
from tandem.scheduling.block_pool import BlockPool
from tandem.scheduling.sequence import Sequence


def counted_request(
    row: int, num_tokens: int, num_output_tokens: int, sampling: SamplingParams, slo: RequestSlo
) -> GenerationRequest:
    """The request in `row` of its stream: `num_tokens` tokens, the last `num_output_tokens` from earlier attempts."""
    token_ids = cast(tuple[int, ...], range(num_tokens))  # only their number is ever asked for
    return GenerationRequest(str(row), token_ids, sampling, num_output_tokens, slo=slo)


class CountedSequence(Sequence):
    """A sequence that knows how many tokens it has, and not which. For a prefix cache it is given the path of its
    blocks (see `prefix_runs`)."""

    __slots__ = ("_num_tokens",)

    def __post_init__(self) -> None:
        self.token_ids = cast(list[int], self.request.token_ids)  # a range; it does not grow
        self._num_tokens = len(self.request.token_ids)

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    @property
    def num_generated(self) -> int:
        return self._num_tokens - self.request.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        return self._num_tokens - self.num_computed

    def append(self, token_id: int) -> None:
        self._num_tokens += 1

    def extend(self, token_ids: list[int]) -> None:
        self._num_tokens += len(token_ids)


class CountedPool(BlockPool):
    """A pool whose blocks are all called 0. For schedulers without a prefix cache: nothing is shared, nothing kept."""

    __slots__ = ("_num_held", "peak_held")

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0, "a pool has at least one block"
        self.num_blocks = num_blocks
        self._num_held = 0
        self.peak_held = 0

    @property
    def num_free(self) -> int:
        return self.num_blocks - self._num_held

    @property
    def num_reclaimable(self) -> int:
        return 0

    @property
    def num_held(self) -> int:
        return self._num_held

    def can_allocate(self, count: int) -> bool:
        return count <= self.num_blocks - self._num_held

    def allocate(self, count: int) -> list[int]:
        assert self.can_allocate(count), f"{count} blocks asked of {self.num_free} free ones"
        self._num_held += count
        if self._num_held > self.peak_held:
            self.peak_held = self._num_held
        return [0] * count

    def release(self, block_ids: list[int] | tuple[int, ...]) -> None:
        self._num_held -= len(block_ids)
        assert self._num_held >= 0, "a block released twice"
