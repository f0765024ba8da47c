"""What the ranks of an instance exchange in a step: how many sums and messages, and how long these take by their size.

A sum or a message of n bytes takes `latency_s` + n / `bytes_per_s` (R. Hockney, "The communication challenge for MPP",
Parallel Computing 20, 1994), often written as alpha + n * beta.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field

from tandem.core.frozen_model import FrozenModel

_MAX_BYTES_PER_S = 1e13  # where no time per byte can be seen


class MessageCost(FrozenModel):
    """Of one operation between a number of ranks."""

    latency_s: float = Field(ge=0)
    bytes_per_s: float = Field(gt=0)

    def seconds(self, num_bytes: float) -> float:
        return self.latency_s + num_bytes / self.bytes_per_s


class MessageTime(FrozenModel):
    num_bytes: int = Field(ge=1)
    seconds: float = Field(gt=0, description="Median")


class Collective(FrozenModel):
    """A sum over `ranks` ranks, or a message from one of them to the next, as an instance's ranks on this machine do
    it. `bytes` are those of one rank's summand, or of the message."""

    operation: Literal["all_reduce", "send"]
    ranks: int = Field(ge=2)
    transport: Literal["shared_memory", "gloo", "nccl"]
    cost: MessageCost
    error: float = Field(ge=0, description="Median relative error of the cost at the sizes that were measured")
    times: tuple[MessageTime, ...] = ()


class StepMessages(FrozenModel):
    """What a step has of them, one after the other. Bytes are per row: prompt token or decoding sequence."""

    all_reduces: int = Field(default=0, ge=0)
    all_reduce_bytes: int = Field(default=0, ge=0)
    sends: int = Field(default=0, ge=0)
    send_bytes: int = Field(default=0, ge=0)


@dataclass(frozen=True, slots=True)
class MessageCosts:
    """The seconds of a step that its messages take. A cost may be None where a step has no such message."""

    messages: StepMessages
    all_reduce: MessageCost | None
    send: MessageCost | None

    def seconds(self, rows: int) -> tuple[float, float]:
        """(sums, messages between stages) of a step with so many rows."""
        sums_s = sends_s = 0.0
        if self.all_reduce is not None:
            sums_s = self.messages.all_reduces * self.all_reduce.seconds(rows * self.messages.all_reduce_bytes)
        if self.send is not None:
            sends_s = self.messages.sends * self.send.seconds(rows * self.messages.send_bytes)
        return sums_s, sends_s


def fit_message_cost(times: Sequence[MessageTime]) -> MessageCost:
    """Least squares of relative errors; neither coefficient is negative. `times` are of at least one size."""
    from scipy.optimize import nnls  # a third of a second, which commands that only read a calibration do not wait

    seconds = np.array([one.seconds for one in times])
    num_bytes = np.array([float(one.num_bytes) for one in times])
    largest = num_bytes.max()  # bytes and 1 differ by many orders of magnitude
    matrix = np.column_stack((np.ones(len(times)), num_bytes / largest)) / seconds[:, None]
    (latency_s, largest_s), _ = nnls(matrix, np.ones(len(times)))
    return MessageCost(
        latency_s=float(latency_s),
        bytes_per_s=min(_MAX_BYTES_PER_S, float(largest / max(largest_s, 1e-300))),
    )


def message_error(cost: MessageCost, times: Sequence[MessageTime]) -> float:
    """Median relative error."""
    return float(np.median([abs(cost.seconds(one.num_bytes) / one.seconds - 1) for one in times]))
