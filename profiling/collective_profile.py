"""Measures sums and messages between ranks on this machine, by size, and fits their costs."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Literal

from tandem.core.parallel import ParallelShape
from tandem.engine.collectives.shared_memory import SharedRegion
from tandem.placement.costs.rank_messages import Collective, MessageTime, fit_message_cost, message_error
from tandem.profiling.collective_rank import RankJob, RankResult
from tandem.profiling.errors import MeasurementError
from tandem.worker.ranks.place import MeetingPlace

_SIZES = tuple(1 << exponent for exponent in range(10, 25, 2))  # 1 KiB (a token of a small model) to 16 MiB
_TIMEOUT_S = 120.0

Operation = Literal["all_reduce", "send"]


def measure_collectives(shapes: Sequence[ParallelShape], device: str) -> Iterator[Collective]:
    """What instances of these shapes need: a sum for each tp above 1, a message for each pp above 1. Each takes a few
    seconds, most of them for starting processes. Raises MeasurementError."""
    for tp in sorted({shape.tp for shape in shapes} - {1}):
        yield measure_collective("all_reduce", tp, device)
    for pp in sorted({shape.pp for shape in shapes} - {1}):
        yield measure_collective("send", pp, device)


def measure_collective(
    operation: Operation, ranks: int, device: str, sizes_bytes: Sequence[int] = _SIZES
) -> Collective:
    """Raises MeasurementError."""
    result = _run_ranks(operation, ranks, device, tuple(sizes_bytes))
    times = tuple(
        MessageTime(num_bytes=size, seconds=seconds) for size, seconds in zip(sizes_bytes, result.seconds, strict=True)
    )
    cost = fit_message_cost(times)
    return Collective.model_validate(
        {
            "operation": operation,
            "ranks": ranks,
            "transport": result.transport,
            "cost": cost,
            "error": message_error(cost, times),
            "times": times,
        }
    )


def _run_ranks(operation: Operation, ranks: int, device: str, sizes_bytes: tuple[int, ...]) -> RankResult:
    with ExitStack() as resources:
        shape = ParallelShape(tp=ranks) if operation == "all_reduce" else ParallelShape(pp=ranks)
        region_fd = SharedRegion.create(shape)
        resources.callback(os.close, region_fd)
        store_fd = MeetingPlace.create_store()
        resources.callback(os.close, store_fd)
        jobs = [
            RankJob(operation, ranks, rank, device, sizes_bytes, region_fd, store_fd, os.getpid())
            for rank in range(ranks)
        ]
        processes = [_start(job, resources) for job in jobs]
        try:
            outputs = [process.communicate(timeout=_TIMEOUT_S) for process in processes]
        except subprocess.TimeoutExpired as error:
            raise MeasurementError(f"{ranks} ranks did not end their {operation} in {_TIMEOUT_S:.0f} s") from error
        for process, (_, complaint) in zip(processes, outputs, strict=True):
            if process.returncode:
                last = complaint.strip().rpartition("\n")[2]
                raise MeasurementError(f"a rank of {ranks} failed in {operation}: {last}")
        fields = json.loads(outputs[0][0])
        return RankResult(fields["transport"], tuple(fields["seconds"]))


def _start(job: RankJob, resources: ExitStack) -> subprocess.Popen[str]:
    """Ended with `resources` if it still runs then."""
    path = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "tandem.profiling.collective_rank", job.as_argument()],
        pass_fds=(job.region_fd, job.store_fd),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
    )
    resources.enter_context(process)
    resources.callback(process.kill)  # without effect on one that has ended
    return process
