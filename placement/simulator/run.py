"""Runs a deployment on a stream of requests, in virtual time."""

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tandem.placement.simulator.deployment import Deployment
from tandem.placement.simulator.event_queue import EventQueue
from tandem.placement.simulator.network import Network
from tandem.placement.simulator.prefixes import BlockNames
from tandem.placement.simulator.record import FINISHED, Record
from tandem.placement.simulator.result import SimulationResult
from tandem.placement.simulator.router import SimulatedRouter
from tandem.placement.simulator.staged_instance import simulated_instance
from tandem.placement.workload.requests import Floats, RequestStream

_EVENTS_PER_LOOK = 512


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a simulation is: of `finished` requests all tokens have come; `refused` requests ended with an error.
    `stamps` and `refused_s` are those of `SimulationResult`, as far as they are known."""

    now_s: float
    finished: int
    refused: int
    stamps: Floats
    refused_s: Floats

    @property
    def finished_s(self) -> Floats:
        """When each request finished, NaN if it has not yet."""
        return self.stamps[:, FINISHED]


def simulate(
    deployment: Deployment,
    requests: RequestStream,
    *,
    until_s: float = math.inf,
    stop_when: Callable[[Progress], bool] | None = None,
    step_by_step: bool = False,
    concurrency: int | None = None,
) -> SimulationResult:
    """Every request from its arrival to its last token. The same arguments give the same result, bit for bit.

    `concurrency` requests at a time, if it is given (a closed loop): their times of arrival do not count; the next one
    arrives when one has ended.
    Ends when all is done, at `until_s`, or when `stop_when`, asked every few hundred events, says so
    (`stopped_early`). An answer ends after exactly its `output_tokens`, which the scheduler knows as `max_tokens`.
    `step_by_step` looks at every decode step alone: the same result up to rounding, slowly.
    """
    with _no_search_for_cycles():
        return _simulate(deployment, requests, until_s, stop_when, step_by_step, concurrency)


@contextmanager
def _no_search_for_cycles() -> Iterator[None]:
    """A simulated request leaves no reference cycle behind; looking for them costs a tenth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _simulate(
    deployment: Deployment,
    requests: RequestStream,
    until_s: float,
    stop_when: Callable[[Progress], bool] | None,
    step_by_step: bool,
    concurrency: int | None,
) -> SimulationResult:
    events = EventQueue()
    record = Record(requests)
    network = Network(deployment.network, events)
    router = SimulatedRouter(deployment.router, requests, events, network, record)
    names = _block_names(deployment, requests)
    instances = {
        spec.instance_id: simulated_instance(spec, events, router, names, step_by_step=step_by_step)
        for spec in deployment.instances
    }
    router.connect(instances, names)
    for failure in deployment.failures:
        events.at(failure.at_s, router.instance_lost, failure.instance_id)
        if math.isfinite(failure.until_s):
            events.at(failure.until_s, router.instance_found, failure.instance_id)

    admission_s = deployment.router.admission_s
    arrivals_s = requests.arrival_s.tolist() if concurrency is None else []
    num_received, num_events, stopped_early = 0, 0, False
    while True:
        if concurrency is not None:
            num_allowed = min(len(requests), concurrency + record.num_finished + record.num_refused)
            arrivals_s += [events.now_s] * (num_allowed - len(arrivals_s))
        arrival_s = arrivals_s[num_received] + admission_s if num_received < len(arrivals_s) else math.inf
        next_s, wake_s = events.next_s(), router.wake_s
        if min(arrival_s, next_s, wake_s) >= until_s or arrival_s == next_s == wake_s == math.inf:
            break
        if wake_s < arrival_s and wake_s < next_s:
            events.now_s = wake_s
            router.wake()
        elif arrival_s <= next_s:
            events.now_s = arrival_s
            router.arrive(num_received, arrivals_s[num_received])
            num_received += 1
        else:
            events.run_next()
        num_events += 1
        if stop_when is not None and num_events % _EVENTS_PER_LOOK == 0:
            stopped_early = stop_when(
                Progress(events.now_s, record.num_finished, record.num_refused, record.stamps, record.refused_s)
            )
            if stopped_early:
                break
    if math.isfinite(until_s) and not stopped_early:
        events.now_s = max(events.now_s, until_s)
    is_whole = num_received == len(requests) and events.next_s() == math.inf
    if is_whole:
        for instance in instances.values():
            instance.check_idle()
    return SimulationResult(
        requests=requests,
        stamps=record.stamps,
        num_attempts=record.num_attempts.clip(min=1),
        num_cached_tokens=record.num_cached_tokens,
        end_s=events.now_s,
        refused_s=record.refused_s,
        instances=tuple(instances[spec.instance_id].use() for spec in deployment.instances),
        stopped_early=stopped_early,
    )


def _block_names(deployment: Deployment, requests: RequestStream) -> BlockNames | None:
    """None where no prefix is shared, or nobody caches any."""
    sizes = [spec.block_size for spec in deployment.instances if spec.prefix_cache and spec.role != "decode"]
    if not sizes or not (requests.prefix_group >= 0).any():
        return None
    return BlockNames(requests, sizes[0])
