"""The token side of the router: accepts requests in token ids, and carries out what the routing machine decides.

consumer --start, aclose--> Dispatcher --submitted, cancelled--> RoutingMachine
   ^                         ^      |                                 |
   | tokens                  |      +---- commands --> Fleet          | submit, cancel, end
RunningRequest <-------------+<------------ events --- Fleet          |
                             +<---------------------------------------+
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from tandem.core.clock import Clock
from tandem.core.errors import DuplicateRequestError, TandemError, UnavailableError, error_from_code
from tandem.core.generation import BlockNamer
from tandem.core.request import FinishReason, GenerationRequest
from tandem.core.session import (
    Cancel,
    KvReserved,
    KvSource,
    NewTokens,
    PrefillFinished,
    PrefillStarted,
    RenewLease,
    RequestFailed,
    SessionEvent,
    Submit,
    TokenFrame,
)
from tandem.router.fleet import Fleet
from tandem.router.profile import ProfileObserver
from tandem.router.records import RequestObserver
from tandem.router.request_observers import RequestObservers
from tandem.router.running import RunningRequest
from tandem.scheduling.prefix_index import block_hashes, extend_block_hashes
from tandem.scheduling.routed_request import Attempt, RoutedRequest
from tandem.scheduling.routing import Selection
from tandem.scheduling.routing_machine import RoutingMachine
from tandem.scheduling.routing_settings import RoutingSettings

if TYPE_CHECKING:
    from tandem.router.fleet import OpenSession

_BLOCKS_AT_ONCE = 2048  # about 4 ms


class Dispatcher:
    """Implements `core.generation.TokenGenerator` and `RoutingDriver`. Used on one event loop only."""

    def __init__(
        self,
        *,
        model: str,
        open_session: "OpenSession",
        heartbeat_timeout_s: float,
        clock: Clock,
        routing: RoutingSettings,
        request_timeout_s: float,
        observers: Sequence[RequestObserver] = (),
        profile: ProfileObserver | None = None,
    ) -> None:
        """`request_timeout_s` is the deadline of a request that names none."""
        self.machine = RoutingMachine(self, routing)
        self.fleet = Fleet(
            model=model,
            open_session=open_session,
            heartbeat_timeout_s=heartbeat_timeout_s,
            clock=clock,
            machine=self.machine,
            on_event=self.on_event,
        )
        self._clock = clock
        self._request_timeout_s = request_timeout_s
        self.observers = RequestObservers(observers)
        self._profile = profile
        self._running: dict[str, RunningRequest] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_error: Exception | None = None
        self._timer_failed = asyncio.Event()
        self._is_draining = False
        self._all_ended = asyncio.Event()
        self._all_ended.set()

    # --- TokenGenerator ----------------------------------------------------------------------------------------------

    @property
    def max_model_len(self) -> int:
        self._check_open()
        return self.machine.capacity_tokens()

    async def name_blocks(self, token_ids: tuple[int, ...], cache_salt: str) -> BlockNamer:
        names: dict[int, list[bytes]] = {}
        for block_size in {instance.status.block_size for instance in self.machine.instances.values()}:
            hashes = names[block_size] = []
            num_blocks = len(token_ids) // block_size
            while len(hashes) < num_blocks:
                end = min(len(hashes) + _BLOCKS_AT_ONCE, num_blocks)
                extend_block_hashes(hashes, token_ids, block_size, cache_salt, end)
                await asyncio.sleep(0)

        def names_of(block_size: int) -> list[bytes]:
            if block_size not in names:  # of an instance that has come since
                names[block_size] = block_hashes(token_ids, block_size, cache_salt)
            return names[block_size]

        return names_of

    def start(
        self, request: GenerationRequest, received_s: float, name_blocks: BlockNamer | None = None, client: str = ""
    ) -> RunningRequest:
        """Also raises DeadlineError if its deadline has passed already."""
        now_s = self._clock.now_s()
        if self._profile is not None:
            self._profile.arrived(now_s)
        try:
            return self._start(request, received_s, now_s, name_blocks, client)
        except TandemError as error:
            self.observers.refused(error, request, received_s=received_s, now_s=now_s, client=client)
            raise

    def _start(
        self,
        request: GenerationRequest,
        received_s: float,
        now_s: float,
        name_blocks: BlockNamer | None,
        client: str,
    ) -> RunningRequest:
        request_id = request.request_id
        self._check_open()
        if request_id in self._running:
            raise DuplicateRequestError(f"a request with the id '{request_id}' is running")
        if request.deadline_s == float("inf"):
            request = replace(request, deadline_s=received_s + self._request_timeout_s)
        self._running[request_id] = running = RunningRequest(self, request, received_s, now_s)
        running.routed = RoutedRequest(
            request_id,
            num_prompt_tokens=len(request.token_ids),
            max_tokens=request.sampling.max_tokens,
            received_s=received_s,
            deadline_s=request.deadline_s,
            name_blocks=name_blocks or partial(block_hashes, request.token_ids, salt=request.cache_salt),
            client=client,
            slo=request.slo,
        )
        try:
            self.machine.submit(running.routed, now_s)
        except TandemError:
            del self._running[request_id]
            raise
        self._all_ended.clear()
        return running

    def _check_open(self) -> None:
        if self._is_draining:
            raise UnavailableError("the router is shutting down")

    # --- RoutingDriver -----------------------------------------------------------------------------------------------

    def submit(self, attempt: Attempt, instance_id: str, source_id: str | None, selection: Selection | None) -> None:
        running = self._running_of(attempt)
        assert selection is not None, "this machine explains its decisions"
        if source_id is None:
            request = running.begin_attempt(attempt, instance_id, selection, self._clock.now_s())
            command = Submit(attempt.handle, request, hand_over=attempt.hand_over)
        else:
            request = running.begin_decode(instance_id, selection, self._clock.now_s())
            source = KvSource(source_id, self.machine.instances[source_id].status.address)
            command = Submit(attempt.handle, request, source)
        self.fleet.send(instance_id, command)

    def cancel(self, attempt: Attempt, instance_id: str) -> None:
        self.fleet.send(instance_id, Cancel(attempt.handle))

    def renew_lease(self, attempt: Attempt, instance_id: str) -> None:
        self.fleet.send(instance_id, RenewLease(attempt.handle))

    def end(self, request: RoutedRequest, error: TandemError | None) -> None:
        running = self._running[str(request.key)]
        self._forget(running)
        running.end(error)

    def wake_at(self, time_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if time_s == math.inf:
            return
        delay_s = max(0.0, time_s - self._clock.now_s())
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer, time_s)

    def _on_timer(self, time_s: float) -> None:
        self._timer = None
        try:  # an event loop's timer may be early by its resolution
            self.machine.advance(max(time_s, self._clock.now_s()))
        except Exception as error:  # noqa: BLE001 - `watch_timer` raises it
            self._timer_error = error
            self._timer_failed.set()

    async def watch_timer(self) -> None:
        """Until cancelled. Raises what has ended the timer: deadlines, retries and leases would then be forgotten."""
        await self._timer_failed.wait()
        assert self._timer_error is not None
        raise self._timer_error

    # --- events of instances -----------------------------------------------------------------------------------------

    def on_event(self, instance_id: str, event: SessionEvent) -> None:
        """Handles an event of an instance. Events of attempts that have ended there are dropped."""
        now_s = self._clock.now_s()
        if isinstance(event, TokenFrame):
            for item in event.items:
                self._on_tokens(instance_id, item, now_s)
            return
        attempt = self.machine.find(instance_id, event.handle)
        if attempt is None:
            return
        running = self._running_of(attempt)
        if isinstance(event, PrefillStarted):
            if not attempt.has_started:
                running.timeline_recorder.prefill_started(now_s)
            self.machine.prefill_started(attempt, event.num_cached_tokens, now_s)
        elif isinstance(event, PrefillFinished):
            if not attempt.has_first_token:
                running.add_first_token(event, now_s)
            self.machine.prefill_finished(attempt, now_s, is_last=event.finish_reason is not None)
            for item in running.take_early_tokens():
                self._add_tokens(running, attempt, item, now_s)
        elif isinstance(event, KvReserved):
            running.timeline_recorder.kv_reserved(now_s)
        elif isinstance(event, RequestFailed):
            error = error_from_code(event.code, event.message)
            self.machine.attempt_failed(attempt, instance_id, error, now_s)
        elif self.machine.transfer_committed(attempt, now_s):
            running.add_transfer(event, now_s)

    def _on_tokens(self, instance_id: str, item: NewTokens, now_s: float) -> None:
        """The two instances' streams are not ordered with each other: tokens may overtake the first one."""
        attempt = self.machine.find(instance_id, item.handle)
        if attempt is not None:
            running = self._running_of(attempt)
            if attempt.has_first_token:
                self._add_tokens(running, attempt, item, now_s)
            else:
                running.hold_tokens(item)

    def _add_tokens(self, running: RunningRequest, attempt: Attempt, item: NewTokens, now_s: float) -> None:
        if self.machine.tokens_generated(attempt, len(item.tokens), now_s):
            running.add_tokens(item, now_s)
            if item.finish_reason is not None:
                self.machine.attempt_finished(attempt, now_s)

    def _running_of(self, attempt: Attempt) -> RunningRequest:
        return self._running[str(attempt.request.key)]

    # --- consumers ---------------------------------------------------------------------------------------------------

    def give_up(self, running: RunningRequest, end: FinishReason | TandemError) -> None:
        """End a request from outside, unless it has ended."""
        if self._running.get(running.request.request_id) is running:
            self._forget(running)
            self.machine.cancel(running.routed, self._clock.now_s())
            running.end(end)

    def closed(self, running: RunningRequest) -> None:
        """The consumer has received the last token, or has closed the request."""
        self.observers.finished(running.record())

    def now_s(self) -> float:
        return self._clock.now_s()

    def _forget(self, running: RunningRequest) -> None:
        del self._running[running.request.request_id]
        if not self._running:
            self._all_ended.set()

    # --- control -----------------------------------------------------------------------------------------------------

    @property
    def is_serving(self) -> bool:
        """Whether a request could be served now."""
        try:
            return not self._is_draining and self.machine.capacity_tokens() > 0
        except UnavailableError:
            return False

    @property
    def running_requests(self) -> int:
        """Requests whose first token is here."""
        return sum(running.has_tokens for running in self._running.values())

    @property
    def queued_requests(self) -> int:
        """Requests without a first token yet."""
        return len(self._running) - self.running_requests

    @property
    def expected_wait_s(self) -> float:
        """Expected wait of a new request until an instance takes it."""
        return self.machine.expected_wait_s(self._clock.now_s())

    def refuse_new(self) -> None:
        """From now on `start` raises UnavailableError; what runs goes on."""
        self._is_draining = True

    async def wait_until_idle(self) -> None:
        """Returns when no request runs on any instance."""
        await self._all_ended.wait()

    def abort_all(self) -> None:
        """End what still runs with UnavailableError."""
        for running in list(self._running.values()):
            self.give_up(running, UnavailableError("the router is shutting down"))
