"""The exchange of tensors between the ranks of one instance during a step. The engine gets an implementation."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from tandem.core.errors import InternalError


class RankLostError(InternalError):
    """Another rank of the instance is gone or does not answer: the whole instance ends."""


class Collectives(Protocol):
    """One rank's side. One thread makes all calls. Ranks that take part in an operation call it in the same order.

    Operations raise RankLostError; after an error the object can only be closed.
    """

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of `x` over the ranks of this rank's stage, with the same bits on all of them; `x` may be
        overwritten, and may be the result.

        All ranks have called when it returns (on CUDA: when it is done), also where `x` is empty: a step that draws no
        token has no rows in its last layer, and ends with its KV on all ranks all the same.
        """
        ...

    def send(self, to_rank: int, x: Tensor) -> None:
        """Send `x`, which may be overwritten once the call has returned, on CUDA by later work of the same stream.
        Waits at most until the receiver has received earlier tensors."""
        ...

    def receive(self, from_rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The next tensor that `from_rank` has sent here, which has this shape and dtype."""
        ...

    def close(self) -> None: ...


class NoCollectives:
    """For an instance of one rank, which exchanges nothing."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def send(self, to_rank: int, x: Tensor) -> None:
        raise AssertionError("there is no other rank")

    def receive(self, from_rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        raise AssertionError("there is no other rank")

    def close(self) -> None:
        pass
