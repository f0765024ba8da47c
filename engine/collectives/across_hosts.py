"""Collectives between ranks on several hosts: shared memory where all that take part are on one host, else gloo or
NCCL."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tandem.core.parallel import RankHosts
from tandem.engine.collectives.interface import Collectives


class AcrossHostsCollectives:
    """Implements `Collectives`. `within` connects the ranks of this rank's host, `between` all of the instance."""

    def __init__(self, hosts: RankHosts, rank: int, within: Collectives, between: Collectives) -> None:
        self._hosts = hosts
        self._rank = rank
        self._within = within
        self._between = between
        first = rank - rank % hosts.shape.tp
        self._of_stage = self._connecting(range(first, first + hosts.shape.tp))

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._of_stage.all_reduce(x)

    def send(self, to_rank: int, x: Tensor) -> None:
        self._connecting((self._rank, to_rank)).send(to_rank, x)

    def receive(self, from_rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self._connecting((self._rank, from_rank)).receive(from_rank, shape, dtype)

    def close(self) -> None:
        self._within.close()
        self._between.close()

    def _connecting(self, ranks: Sequence[int]) -> Collectives:
        return self._within if self._hosts.share_host(ranks) else self._between
