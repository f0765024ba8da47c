"""Windows over a whole trace, so that a plan is for all of it.

A trace is divided into windows of equal time with about `requests` requests each. Of a long trace not all windows are
simulated: its windows are sorted by demand and divided into groups of equal size, and the window of each group with the
highest demand stands for the group (stratified sampling, with the worst case of each stratum). The demand of a window
is the larger of its prompt tokens and its output tokens per second, relative to their means in the trace.

The windows that are simulated follow each other in one stream. Their requests, and the rates of the windows relative
to each other, are those of the trace.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tandem.placement.workload.description import repeated_tokens
from tandem.placement.workload.requests import Floats, Ints, RequestStream

_MAX_BINS = 512
_MAX_WINDOWS = 8
_MIN_SHARE = 0.05  # of the mean number of requests in a window; windows with fewer join the window before
_MAX_SIZE = 2  # most requests of a window that are simulated, as a multiple of `requests`


@dataclass(frozen=True, slots=True)
class Window:
    """`rows` [first, last) of the stream that is simulated. The other figures are of the window in the trace:
    [`begin_s`, `end_s`) since the first arrival, its requests per second, mean lengths, and the share of its prompt
    tokens that repeat an earlier request of the trace. `time_share` is the part of the trace that it stands for."""

    rows: tuple[int, int]
    begin_s: float
    end_s: float
    time_share: float
    rate: float
    prompt_tokens: float
    output_tokens: float
    repeated_share: float


@dataclass(frozen=True, slots=True)
class WindowedTrace:
    """`stream.load` is the ratio of its rate to that of the trace. `simulated_share`: of the requests of the trace."""

    stream: RequestStream
    windows: tuple[Window, ...]
    simulated_share: float


def windowed(trace: RequestStream, requests: int, *, whole: bool = False) -> WindowedTrace:
    """`whole`: every request is in the stream, in at most eight windows."""
    count = len(trace) // requests
    edges = _edges(trace, max(1, min(count, _MAX_WINDOWS if whole else _MAX_BINS)))
    firsts = np.searchsorted(trace.arrival_s, edges[:-1])
    lasts = np.append(firsts[1:], len(trace))
    chosen, shares = _representatives(trace, edges, firsts, lasts)
    repeated = repeated_tokens(trace)
    duration_s = max(trace.duration_s, 1e-9)
    windows: list[Window] = []
    parts: list[Ints] = []
    arrivals: list[Floats] = []
    end_s, num_rows = 0.0, 0
    for index, share in zip(chosen, shares, strict=True):
        first, last = int(firsts[index]), int(lasts[index])
        size = last - first if whole or len(edges) - 1 <= _MAX_WINDOWS else min(last - first, _MAX_SIZE * requests)
        rows = np.arange(first, first + size)
        begin_s = edges[index]
        arrivals.append(trace.arrival_s[rows] - begin_s + end_s)
        # What is left out would have begun with the next arrival.
        end_s += (edges[index + 1] if size == last - first else trace.arrival_s[first + size]) - begin_s
        prompts = trace.prompt_tokens[first:last]
        windows.append(
            Window(
                rows=(num_rows, num_rows + size),
                begin_s=float(begin_s),
                end_s=float(edges[index + 1]),
                time_share=share,
                rate=(last - first) / max(1e-9, float(edges[index + 1] - begin_s)),
                prompt_tokens=float(prompts.mean()),
                output_tokens=float(trace.output_tokens[first:last].mean()),
                repeated_share=float(repeated[first:last].sum() / prompts.sum()),
            )
        )
        parts.append(rows)
        num_rows += size
    stream = replace(trace.select(np.concatenate(parts)), arrival_s=np.concatenate(arrivals))
    load = 1.0 if num_rows == len(trace) else num_rows / end_s / (len(trace) / duration_s)
    return WindowedTrace(replace(stream, load=load), tuple(windows), num_rows / len(trace))


def window_stream(stream: RequestStream, window: Window) -> RequestStream:
    """The requests of one window; its `load` is the ratio of its rate to that of the trace."""
    part = stream.select(slice(*window.rows))
    load = part.rate / stream.rate * stream.load if stream.rate > 0 else 1.0
    return replace(part, load=load or 1.0)


def _edges(trace: RequestStream, count: int) -> Floats:
    """Of windows of equal time; a window with few requests is joined to the one before it, the first to the second."""
    edges = np.linspace(0.0, trace.duration_s, count + 1)
    counts = np.diff(np.append(np.searchsorted(trace.arrival_s, edges[:-1]), len(trace)))
    enough = counts >= _MIN_SHARE * len(trace) / count
    kept = [0.0, *(float(edges[i]) for i in range(1, count) if enough[i] and enough[:i].any())]
    return np.array([*kept, trace.duration_s])


def _representatives(
    trace: RequestStream, edges: Floats, firsts: Ints, lasts: Ints
) -> tuple[Sequence[int], Sequence[float]]:
    """(windows in order of time, the share of the trace's time that each stands for)."""
    lengths_s = np.maximum(np.diff(edges), 1e-9)
    shares = lengths_s / lengths_s.sum()
    if len(lengths_s) <= _MAX_WINDOWS:
        return range(len(lengths_s)), shares.tolist()
    demands = []
    for tokens in (trace.prompt_tokens, trace.output_tokens):
        sums = np.concatenate([[0], np.cumsum(tokens)])
        demands.append((sums[lasts] - sums[firsts]) / lengths_s / (sums[-1] / lengths_s.sum()))
    order = np.argsort(-np.maximum(*demands), kind="stable")
    groups = np.array_split(order, _MAX_WINDOWS)
    represented = sorted((int(group[0]), float(shares[group].sum())) for group in groups)
    return [index for index, _ in represented], [share for _, share in represented]
