"""Collectives over torch.distributed: NCCL between GPUs, gloo between CPUs of different hosts or without our kernels.

NCCL HAS NOT RUN YET, because no machine with two GPUs was available. A process that uses NCCL sets
TORCH_NCCL_ASYNC_ERROR_HANDLING=0 before it imports torch, or torch ends it on the first error. Neither library detects
reliably that a peer is gone: the process that has started the ranks watches them, and ends them (`worker.ranks`).
"""

import contextlib
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import ProcessGroupGloo, Work

from tandem.core.parallel import ParallelShape
from tandem.engine.collectives.interface import RankLostError

_TIMEOUT = timedelta(seconds=300)


class ProcessGroupCollectives:
    """Implements `Collectives` with a group of the stage for sums and a group of all ranks for messages."""

    def __init__(self, stage_group: Any, instance_group: Any, device: torch.device) -> None:
        """`stage_group` None: the stage has one rank."""
        self._stage_group = stage_group
        self._instance_group = instance_group
        self._device = device
        self._sending: dict[int, tuple[Work, Tensor]] = {}  # by rank: the last send, until it is known to be done

    @classmethod
    def connect(
        cls, shape: ParallelShape, rank: int, store: Store, device: torch.device, host: str
    ) -> "ProcessGroupCollectives":
        """Blocks until all ranks of the instance do the same, with one `store`. gloo listens on `host`.

        Raises RankLostError.
        """
        make = partial(_nccl_group, device=device) if device.type == "cuda" else partial(_gloo_group, host=host)
        stage, tp_rank = divmod(rank, shape.tp)
        try:
            instance_group = make(PrefixStore("instance", store), rank, shape.num_ranks)
            stage_group = None
            if shape.tp > 1:
                stage_group = make(PrefixStore(f"stage-{stage}", store), tp_rank, shape.tp)
        except RuntimeError as error:
            raise RankLostError("the ranks of the instance did not connect") from error
        return cls(stage_group, instance_group, device)

    def all_reduce(self, x: Tensor) -> Tensor:
        if self._stage_group is not None:
            x = x.contiguous()
            summand = x if x.numel() else x.new_zeros(1)  # for empty tensors the libraries do not wait for other ranks
            _finish(lambda: self._stage_group.allreduce([summand]))
        return x

    def send(self, to_rank: int, x: Tensor) -> None:
        self._finish_send(to_rank)
        # gloo completes a send only when the peer receives: the copy lets the caller go on.
        x = x.contiguous() if x.is_cuda else x.clone(memory_format=torch.contiguous_format)
        try:
            self._sending[to_rank] = (self._instance_group.send([x], to_rank, 0), x)
        except RuntimeError as error:
            raise _lost() from error

    def receive(self, from_rank: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        x = torch.empty(*shape, dtype=dtype, device=self._device)
        _finish(lambda: self._instance_group.recv([x], from_rank, 0))
        return x

    def close(self) -> None:
        """Ends the groups when all is sent; on CUDA after all graphs that use them."""
        with contextlib.suppress(RankLostError):
            for rank in list(self._sending):
                self._finish_send(rank)
        for group in (self._stage_group, self._instance_group):
            if group is not None:
                group.shutdown()

    def _finish_send(self, to_rank: int) -> None:
        if to_rank in self._sending:
            work, _ = self._sending.pop(to_rank)
            _finish(lambda: work)


def _finish(start: Callable[[], Work]) -> None:
    """`start()` returns an operation under way; on CUDA later work of the current stream waits for it, not the host."""
    try:
        start().wait()
    except RuntimeError as error:
        raise _lost() from error


def _lost() -> RankLostError:
    return RankLostError("another rank of the instance is gone or does not answer")


def _gloo_group(store: Store, rank: int, size: int, host: str) -> Any:
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = _TIMEOUT
    options._threads = 1
    options._devices = [ProcessGroupGloo.create_device(hostname=host, lazy_init=False)]
    return ProcessGroupGloo(store, rank, size, options)


def _nccl_group(store: Store, rank: int, size: int, device: torch.device) -> Any:
    options = distributed.ProcessGroupNCCL.Options()
    options._timeout = _TIMEOUT
    options.global_ranks_in_group = list(range(size))
    group = distributed.ProcessGroupNCCL(store, rank, size, options)
    group._set_sequence_number_for_group()
    group.eager_connect_single_device(device)
    return group
