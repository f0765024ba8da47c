"""A stream of requests as arrays: the form of traces, distributions and live profiles."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RequestStream:
    """`n` requests in order of arrival. Arrays of length n, read-only by convention.

    `output_tokens` counts all generated tokens, the first included, and is at least 1. `slo_class[i]` is an index into
    the SLO classes. Prefix sharing: the first `prefix_tokens[i]` prompt tokens of request i are the first tokens of
    group `prefix_group[i]`, equal for all members; shorter prefixes of a group are parts of its longest prefix. Group
    -1 shares nothing. `load` is the ratio of the stream's rate to that of the workload of which it is a part: above 1
    for a busy hour of a day.
    """

    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    slo_class: Ints
    prefix_group: Ints
    prefix_tokens: Ints
    load: float = 1.0

    @classmethod
    def make(
        cls,
        arrival_s: Floats,
        prompt_tokens: Ints,
        output_tokens: Ints,
        slo_class: Ints | None = None,
        prefix_group: Ints | None = None,
        prefix_tokens: Ints | None = None,
    ) -> "RequestStream":
        """By default all requests have class 0 and share nothing."""
        zeros = np.zeros(len(arrival_s), dtype=np.int64)
        return cls(
            arrival_s=np.asarray(arrival_s, dtype=np.float64),
            prompt_tokens=np.asarray(prompt_tokens, dtype=np.int64),
            output_tokens=np.asarray(output_tokens, dtype=np.int64),
            slo_class=zeros if slo_class is None else slo_class,
            prefix_group=zeros - 1 if prefix_group is None else prefix_group,
            prefix_tokens=zeros if prefix_tokens is None else prefix_tokens,
        )

    def __post_init__(self) -> None:
        n = len(self.arrival_s)
        arrays = (self.prompt_tokens, self.output_tokens, self.slo_class, self.prefix_group, self.prefix_tokens)
        assert all(len(array) == n for array in arrays), "one entry per request in every array"
        assert n == 0 or bool(np.all(np.diff(self.arrival_s) >= 0)), "requests are in order of arrival"
        assert n == 0 or int(self.output_tokens.min()) >= 1, "a request has at least one output token"
        assert n == 0 or int(self.prompt_tokens.min()) >= 1, "a prompt has at least one token"

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def duration_s(self) -> float:
        """Last arrival minus first arrival."""
        return float(self.arrival_s[-1] - self.arrival_s[0]) if len(self) else 0.0

    @property
    def rate(self) -> float:
        """Requests per second."""
        return (len(self) - 1) / self.duration_s if self.duration_s > 0 else 0.0

    def scaled_to(self, rate: float) -> "RequestStream":
        """The same requests, the first at 0, for another mean rate of the workload; the mean rate of the stream becomes
        `rate` * `load`. Only the arrival times are scaled, so two rates are compared on common random numbers."""
        return replace(self, arrival_s=(self.arrival_s - self.arrival_s[:1]) * (self.rate / (rate * self.load)))

    def head(self, count: int) -> "RequestStream":
        return self.select(slice(0, count))

    def select(self, which: slice | npt.NDArray[np.bool_] | Ints) -> "RequestStream":
        """The requests of a range, of a boolean mask, or with these ascending indices."""
        return RequestStream(
            self.arrival_s[which],
            self.prompt_tokens[which],
            self.output_tokens[which],
            self.slo_class[which],
            self.prefix_group[which],
            self.prefix_tokens[which],
            self.load,
        )


def merged(streams: Sequence[RequestStream]) -> RequestStream:
    """All requests of `streams`, at least one, in order of arrival. Groups with equal numbers become one."""
    order = np.argsort(np.concatenate([stream.arrival_s for stream in streams]), kind="stable")
    arrays = [field.name for field in fields(RequestStream) if field.name != "load"]
    return RequestStream.make(*(np.concatenate([getattr(one, name) for one in streams])[order] for name in arrays))
