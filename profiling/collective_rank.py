"""One rank of a measurement of sums and messages: `python -m tandem.profiling.collective_rank JOB`, JOB as JSON.

`profiling.collective_profile` starts all ranks. They meet as the ranks of an instance do, and have the same
collectives. Rank 0 prints the transport and the seconds of each size as JSON.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

import torch

from tandem.core.errors import TandemError
from tandem.core.parallel import ParallelShape
from tandem.core.parent_process import end_with_parent
from tandem.engine.collectives.interface import Collectives
from tandem.engine.collectives.shared_memory import SharedMemoryCollectives, SharedRegion
from tandem.engine.device import choose_device
from tandem.worker.ranks.place import MeetingPlace

_ADOPTION_S = 10.0
_BLOCKS = 7  # of operations in a row; the first one does not count
_BLOCK_BYTES = 16 << 20  # in a block of large operations
_MOST_IN_BLOCK = 200


@dataclass(frozen=True, slots=True)
class RankJob:
    """Rank `rank` of `ranks`. `sizes_bytes`: multiples of 4. `region_fd`, `store_fd`: where the ranks meet."""

    operation: str
    ranks: int
    rank: int
    device: str
    sizes_bytes: tuple[int, ...]
    region_fd: int
    store_fd: int
    parent: int

    @property
    def shape(self) -> ParallelShape:
        return ParallelShape(tp=self.ranks) if self.operation == "all_reduce" else ParallelShape(pp=self.ranks)

    def as_argument(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True, slots=True)
class RankResult:
    """What rank 0 prints."""

    transport: str
    seconds: tuple[float, ...]  # in the order of the job's sizes


def main() -> int:
    fields = json.loads(sys.argv[1])
    job = RankJob(**fields | {"sizes_bytes": tuple(fields["sizes_bytes"])})
    if not end_with_parent(job.parent, _ADOPTION_S):
        return 1
    torch.set_num_threads(1)
    try:
        result = _measure(job)
    except TandemError as error:
        print(error.message, file=sys.stderr)
        return 1
    if job.rank == 0:
        print(json.dumps(asdict(result)), flush=True)
    return 0


def _measure(job: RankJob) -> RankResult:
    """Raises ConfigError or RankLostError."""
    device = choose_device(job.device)
    if device.type == "cuda":
        device = torch.device("cuda", job.rank)
        torch.cuda.set_device(device)
    place = MeetingPlace(job.shape, SharedRegion(job.region_fd, job.shape), job.store_fd)
    os.close(job.region_fd)
    collectives = place.collectives(job.rank, device)
    operate = _sum if job.operation == "all_reduce" else _pass_around
    seconds = [_seconds(operate, job, collectives, device, size) for size in job.sizes_bytes]
    collectives.close()
    return RankResult(_transport(collectives, device), tuple(seconds))


def _seconds(
    operate: Callable[[RankJob, Collectives, torch.Tensor], None],
    job: RankJob,
    collectives: Collectives,
    device: torch.device,
    size: int,
) -> float:
    """Of one operation. All ranks do as many."""
    x = torch.zeros(size // 4, dtype=torch.float32, device=device)
    count = max(1, min(_MOST_IN_BLOCK, _BLOCK_BYTES // size))
    blocks = []
    for _ in range(_BLOCKS):
        began_s = time.perf_counter()
        for _ in range(count):
            operate(job, collectives, x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        blocks.append((time.perf_counter() - began_s) / count)
    hops = 1 if job.operation == "all_reduce" else job.ranks
    return median(blocks[1:]) / hops


def _sum(job: RankJob, collectives: Collectives, x: torch.Tensor) -> None:
    collectives.all_reduce(x)


def _pass_around(job: RankJob, collectives: Collectives, x: torch.Tensor) -> None:
    """A message from rank 0 through all stages and back: as many hops as ranks."""
    if job.rank == 0:
        collectives.send(1, x)
        collectives.receive(job.ranks - 1, x.shape, x.dtype)
    else:
        received = collectives.receive(job.rank - 1, x.shape, x.dtype)
        collectives.send((job.rank + 1) % job.ranks, received)


def _transport(collectives: Collectives, device: torch.device) -> str:
    if isinstance(collectives, SharedMemoryCollectives):
        return "shared_memory"
    return "nccl" if device.type == "cuda" else "gloo"


if __name__ == "__main__":
    sys.exit(main())
