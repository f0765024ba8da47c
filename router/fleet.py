"""Who is alive: instances register by heartbeats, and the router keeps one session open to each.

    heartbeat --> registered --session opened--> connected --session broken--> registered, reconnecting
                      ^ |                            |
                      | |                            +--its step is stalled--> registered, without a session
                      | |                                                           |
                      | +---- silence, a new instance at the same address,          |
                      |       or a malformed report ---> gone                       |
                      +------------------- its step has ended ----------------------+

The end of a session fails all attempts at the instance, which then go on elsewhere, and frees what they hold there as
soon as the instance reads it.

Only I/O happens here: what instances report, and whether they can be reached, goes to the routing machine; their events
go to `on_event`. Time is passed in.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tandem.core.clock import Clock
from tandem.core.errors import IncompatiblePeerError, InvalidRequestError, TandemError, UnavailableError
from tandem.core.session import InstanceState, InstanceStatus, SessionCommand, SessionEvent
from tandem.scheduling.known_instance import KnownInstance
from tandem.scheduling.routing_machine import RoutingMachine

if TYPE_CHECKING:
    from tandem.wire.sessions import InstanceSession

OpenSession = Callable[[str], Awaitable["InstanceSession"]]  # from the instance's address

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.05
LAST_BACKOFF_S = 2.0
LONGEST_ROUND_S = 0.25
ALL_SILENT_SHARE = 1 / 3  # of the heartbeat time-out without any heartbeat: then all instances are silent
ALL_SILENT_FACTOR = 2  # time-outs, after which the silence of all counts as theirs

_WITH_SESSION = (InstanceState.READY, InstanceState.DRAINING)


@dataclass(slots=True, eq=False)
class _Registration:
    """One registered instance. `session` is None while it cannot be reached."""

    instance_id: str
    role: str
    address: str
    heard_s: float  # when something of it was heard, in the fleet's listened time
    session: "InstanceSession | None" = None
    keeper: asyncio.Task[None] | None = None


class Fleet:
    """All live instances of one router. Used on one event loop only."""

    def __init__(
        self,
        *,
        model: str,
        open_session: "OpenSession",
        heartbeat_timeout_s: float,
        clock: Clock,
        machine: RoutingMachine,
        on_event: Callable[[str, SessionEvent], None],
    ) -> None:
        """`on_event` gets each event with the id of its instance."""
        self._model = model
        self._open_session = open_session
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._round_s = min(LONGEST_ROUND_S, heartbeat_timeout_s / 10)
        self._clock = clock
        self._machine = machine
        self._on_event = on_event
        self._registered: dict[str, _Registration] = {}
        self._listened_s = 0.0  # the time that counts as silence: see `_listen`
        self._round_at_s = clock.now_s()
        self._any_heard_s = clock.now_s()
        self._changed = asyncio.Event()

    @property
    def instances(self) -> tuple[KnownInstance, ...]:
        """All that are registered, usable or not."""
        return tuple(self._machine.instances.values())

    def heartbeat(self, status: InstanceStatus) -> None:
        """Register an instance or keep it registered. Raises IncompatiblePeerError if it serves another model, and
        InvalidRequestError for values that cannot be; the instance is then dropped."""
        if status.model != self._model:
            raise IncompatiblePeerError(f"this router serves '{self._model}', not '{status.model}'")
        known = self._registered.get(status.instance_id)
        try:
            _check(status)
        except InvalidRequestError as error:
            if known is not None:
                self._lose(known, error.message)
            raise
        if known is None or known.address != status.address:
            for other in list(self._registered.values()):
                if other is known or other.address == status.address:
                    self._lose(other, "another instance has taken its place")
            known = _Registration(status.instance_id, status.role.value, status.address, 0.0)
            self._registered[status.instance_id] = known
            logger.info("%s instance %s has joined", status.role.value, status.instance_id)
            self._compare_files(status)
        now_s = self._any_heard_s = self._clock.now_s()
        known.heard_s = self._listened_s + min(now_s - self._round_at_s, self._round_s)
        known.role = status.role.value
        if status.state is InstanceState.STALLED:
            self._end_session(known, status.step_age_s)
        self._machine.instance_reported(status, now_s)
        if known.keeper is None and status.state in _WITH_SESSION:
            self._changed.set()

    def _compare_files(self, joining: InstanceStatus) -> None:
        """Instances with other model files form no pairs. That is so during an update, or a mistake that nobody would
        notice otherwise."""
        for known in self._machine.instances.values():
            other = known.status
            if joining.weights_hash and other.weights_hash and joining.weights_hash != other.weights_hash:
                logger.warning(
                    "instance %s at %s has other model files than %s at %s (hash %s, not %s): KV does not move between "
                    "them; unless this is an update, copy the model again",
                    *(joining.instance_id, joining.address, other.instance_id, other.address),
                    *(joining.weights_hash[:16], other.weights_hash[:16]),
                )
                return

    def send(self, instance_id: str, command: SessionCommand) -> None:
        """Queue a command; never blocks. A command is dropped when the session is closed: the machine then hears of the
        end of the session, which fails all attempts there."""
        registration = self._registered.get(instance_id)
        if registration is not None and registration.session is not None:
            try:
                registration.session.send(command)
            except UnavailableError:
                return

    async def run(self) -> None:
        """Open and keep sessions, and drop the silent, until cancelled; then everything open fails."""
        self._round_at_s = self._clock.now_s()
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    self._listen(self._clock.now_s())
                    self._drop_silent()
                    for registration in self._registered.values():
                        state = self._machine.instances[registration.instance_id].status.state
                        if registration.keeper is None and state in _WITH_SESSION:
                            registration.keeper = group.create_task(self._keep_session(registration))
                    await self._wait_for_change()
        finally:
            for registration in list(self._registered.values()):
                self._remove(registration)  # it is the router that goes

    async def _wait_for_change(self) -> None:
        try:
            async with asyncio.timeout(self._round_s):
                await self._changed.wait()
        except TimeoutError:
            pass
        self._changed.clear()

    def _listen(self, now_s: float) -> None:
        """Count the time since the last round as listened, unless the fault may be the router's.

        A late round means that the router was stopped and read no heartbeats: no more of it counts than of a round that
        is just in time, so that a router which is always late finds who is silent, too. When no instance at all is
        heard, the router may be cut off or short of a core, and there is no instance to go to instead: such a silence
        counts only after `ALL_SILENT_FACTOR` time-outs.
        """
        round_s, self._round_at_s = now_s - self._round_at_s, now_s
        if round_s > 2 * self._round_s:
            logger.warning("the router was stopped for %.1f s", round_s)
            self._any_heard_s = now_s
            self._listened_s += 2 * self._round_s
            return
        silent_s = now_s - self._any_heard_s
        if not ALL_SILENT_SHARE * self._heartbeat_timeout_s < silent_s < ALL_SILENT_FACTOR * self._heartbeat_timeout_s:
            self._listened_s += round_s

    def _drop_silent(self) -> None:
        oldest_s = self._listened_s - self._heartbeat_timeout_s
        for registration in list(self._registered.values()):
            if registration.heard_s < oldest_s:
                self._lose(registration, "it has fallen silent")

    def _lose(self, registration: _Registration, why: str) -> None:
        logger.warning("%s instance %s is gone: %s", registration.role, registration.instance_id, why)
        self._remove(registration)

    def _remove(self, registration: _Registration) -> None:
        del self._registered[registration.instance_id]
        registration.session = None
        if registration.keeper is not None:
            registration.keeper.cancel()
        self._machine.instance_removed(registration.instance_id, self._clock.now_s())

    def _end_session(self, registration: _Registration, step_age_s: float) -> None:
        """The instance is there and computes nothing: `run` opens another session when its step has ended."""
        if registration.keeper is None:
            return
        logger.warning(
            "%s instance %s is stalled: a step of %.1f s", registration.role, registration.instance_id, step_age_s
        )
        registration.keeper.cancel()
        registration.keeper = None
        self._disconnect(registration, registration.session)

    async def _keep_session(self, registration: _Registration) -> None:
        """Keep one session open, with growing pauses between tries, until the instance is removed."""
        backoff_s, instance_id = FIRST_BACKOFF_S, registration.instance_id
        while True:
            try:
                session = await self._open_session(registration.address)
                try:
                    self._connect(registration, session)
                    async for event in session.events():
                        registration.heard_s = self._listened_s
                        self._on_event(instance_id, event)
                        backoff_s = FIRST_BACKOFF_S
                finally:
                    self._disconnect(registration, session)
                    await session.close()
            except TandemError as error:
                logger.warning("session with %s is over: %s", instance_id, error.message)
            except Exception:
                logger.exception("session with %s is dropped", instance_id)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, LAST_BACKOFF_S)

    def _connect(self, registration: _Registration, session: "InstanceSession") -> None:
        registration.session = session
        self._machine.instance_connected(registration.instance_id, self._clock.now_s())

    def _disconnect(self, registration: _Registration, session: "InstanceSession | None") -> None:
        if session is not None and registration.session is session:  # else it has been ended from outside
            registration.session = None
            self._machine.instance_lost(registration.instance_id, self._clock.now_s())


def _check(status: InstanceStatus) -> None:
    """Raises InvalidRequestError for values that cannot be."""
    positive = (status.max_model_len, status.block_size, status.blocks.total)
    others = (
        status.blocks.free,
        status.blocks.cached,
        status.waiting_requests,
        status.running_requests,
        status.uncomputed_tokens,
        status.unreserved_tokens,
    )
    if min(positive) < 1 or min(others) < 0:
        raise InvalidRequestError(f"the heartbeat of {status.instance_id} has values that cannot be: {status}")
