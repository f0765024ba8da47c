"""The simulator's driver of the routing machine, fed with what happened to a live router."""

from typing import Any, cast

import numpy as np
import pytest

from tandem.core.errors import TandemError, error_from_code
from tandem.core.session import (
    KvReserved,
    NewTokens,
    PrefillFinished,
    PrefillStarted,
    RequestFailed,
    SessionEvent,
    TokenFrame,
)
from tandem.placement.simulator.attempt import Attempt
from tandem.placement.simulator.deployment import InstanceSpec, NetworkSpec, RouterSpec
from tandem.placement.simulator.event_queue import EventQueue
from tandem.placement.simulator.instance import SimulatedInstance
from tandem.placement.simulator.network import Network
from tandem.placement.simulator.prefixes import BlockNames
from tandem.placement.simulator.record import Record
from tandem.placement.simulator.router import SimulatedRouter
from tandem.placement.workload.requests import RequestStream
from tandem.scheduling import routed_request
from tandem.scheduling.routed_request import RoutedRequest
from tandem.scheduling.routing import Selection
from tandem.scheduling.routing_settings import RoutingSettings
from tests.conformance.live_run import BLOCK_SIZE, ROLES, STEP_COST, Ask, Recording, ended, submitted
from tests.placement.simulator.deployments import LinearCost

_SAME_TIME_S = 1e-6  # within which the live event loop may call timers in another order than that of their times


class SilentInstance(SimulatedInstance):
    """An instance for which the replay speaks. `attempts` are by handle, of all instances."""

    def __init__(self, spec: InstanceSpec, attempts: dict[int, Attempt]) -> None:
        self.spec = spec
        self._attempts = attempts

    def submit(self, attempt: Attempt, *, is_remote: bool = False, hand_over: bool = False) -> None:
        if not is_remote:
            self._attempts[attempt.routed.handle] = attempt

    def arrived(self, attempt: Attempt) -> None: ...

    def release(self, attempt: Attempt) -> None:
        attempt.num_handed_on = attempt.routed.request.num_output_tokens

    def fail(self) -> None: ...


class ReplayRouter(SimulatedRouter):
    """Writes its decisions down. Reports come from the recording."""

    recording: Recording

    def _join(self, instance_id: str) -> None: ...

    def _send(self, attempt: Attempt) -> None:
        """The recording says when KV has come."""

    def submit(
        self, attempt: routed_request.Attempt, instance_id: str, source_id: str | None, selection: Selection | None
    ) -> None:
        self.recording.decisions.append(submitted(self._events.now_s, attempt, instance_id, source_id))
        super().submit(attempt, instance_id, source_id, selection)

    def cancel(self, attempt: routed_request.Attempt, instance_id: str) -> None:
        self.recording.decisions.append((self._events.now_s, "cancel", attempt.handle, instance_id))
        super().cancel(attempt, instance_id)

    def end(self, request: RoutedRequest, error: TandemError | None) -> None:
        self.recording.decisions.append(ended(self._events.now_s, request, error))
        super().end(request, error)


class Replay:
    def __init__(
        self,
        live: Recording,
        instance_ids: tuple[str, ...],
        asks: list[Ask],
        routing: RoutingSettings,
        request_timeout_s: float,
    ) -> None:
        arrival_s = np.full(len(asks), np.inf)
        for time_s, what, row in live.events:
            if what == "arrive":
                arrival_s[row] = time_s
        requests = RequestStream.make(
            arrival_s,
            np.array([ask.prompt_tokens for ask in asks]),
            np.array([ask.output_tokens for ask in asks]),
            prefix_group=np.array([ask.group for ask in asks]),
            prefix_tokens=np.array([ask.prefix_blocks * BLOCK_SIZE for ask in asks]),
        )
        self._live = live
        self._events = EventQueue()
        spec = RouterSpec(request_timeout_s=request_timeout_s, routing=routing)
        network = Network(NetworkSpec(), self._events)
        self._record = Record(requests)
        self.router = ReplayRouter(spec, requests, self._events, network, self._record)
        self.router.recording = Recording()
        self._attempts: dict[int, Attempt] = {}
        instances = {}
        for name in instance_ids:
            role = ROLES[name[0]].value
            spec_of = InstanceSpec(name, cast(Any, role), LinearCost(), 64, BLOCK_SIZE, step_cost=STEP_COST)
            instances[name] = SilentInstance(spec_of, self._attempts)
        self.router.connect(instances, BlockNames(requests, BLOCK_SIZE))
        self._early: dict[int, list[NewTokens]] = {}

    def run(self) -> Recording:
        """In the recorded order, that of the timer's calls too: an event may come in the very moment of such a call,
        and what is decided depends on which of the two is first."""
        router = self.router
        for time_s, what, argument in self._live.events:
            if what == "wake":
                assert router.wake_s == pytest.approx(time_s), "woken for nothing"
            else:
                assert router.wake_s > time_s - _SAME_TIME_S, "not woken in time"
            self._events.now_s = time_s
            self._apply(what, argument)
        assert router.wake_s == float("inf"), "it waits for something"
        router.recording.num_refused = self._record.num_refused
        return router.recording

    def _apply(self, what: str, argument: Any) -> None:
        router, now_s = self.router, self._events.now_s
        machine = router.machine
        if what == "wake":
            router.wake()
        elif what == "arrive":
            router.arrive(argument)
        elif what == "cancel":
            if (request := machine._requests.get(argument)) is not None:
                machine.cancel(request, now_s)
        elif what == "event":
            self._tell(*argument)
        elif what in ("instance_lost", "instance_removed"):
            if machine.instances[argument].is_connected:
                router._fail(argument)
            getattr(machine, what)(argument, now_s)
        else:
            getattr(machine, what)(argument, now_s)

    def _tell(self, instance_id: str, event: SessionEvent) -> None:
        router = self.router
        if isinstance(event, TokenFrame):
            for item in event.items:
                self._tokens(instance_id, item)
            return
        if router.machine.find(instance_id, event.handle) is None:
            return  # not even an instance of the simulator speaks of what it does not have
        attempt = self._attempts[event.handle]
        if isinstance(event, PrefillStarted):
            router.prefill_started(attempt, event.num_cached_tokens)
        elif isinstance(event, PrefillFinished):
            router.prefill_finished(attempt, self._events.now_s)
            for item in self._early.pop(event.handle, []):
                self._add(attempt, item)
        elif isinstance(event, KvReserved):
            router.decode_reserved(attempt)
        elif isinstance(event, RequestFailed):
            router.failed(attempt, instance_id, error_from_code(event.code, event.message))
        else:
            router.transfer_committed(attempt)

    def _tokens(self, instance_id: str, item: NewTokens) -> None:
        """In the simulator tokens do not overtake the first one, and are counted at the end."""
        if self.router.machine.find(instance_id, item.handle) is not None:
            attempt = self._attempts[item.handle]
            if attempt.routed.has_first_token:
                self._add(attempt, item)
            else:
                self._early.setdefault(item.handle, []).append(item)

    def _add(self, attempt: Attempt, item: NewTokens) -> None:
        taken = self.router.machine.tokens_generated(attempt.routed, len(item.tokens), self._events.now_s)
        if taken and item.finish_reason is not None:
            self.router.decode_finished(attempt)
