"""Who is alive: instances register by heartbeats, and the router keeps one session open to each.

    heartbeat --> registered --session opened--> usable (READY) --session broken--> registered, reconnecting
                      |                            |
                      +------- silence, or a new instance at the same address ---> gone: all its attempts fail

Time is passed in; the work happens in `run`.
"""

import asyncio
import logging

from core.clock import Clock
from core.errors import ContextLengthError, IncompatiblePeerError, TandemError, UnavailableError
from core.session import InstanceState, InstanceStatus, Role
from router.instances import Instance, SessionOpener

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.05
LAST_BACKOFF_S = 2.0


class Fleet:
    """All live instances of one router. Used on one event loop only."""

    def __init__(self, *, model: str, opener: SessionOpener, heartbeat_timeout_s: float, clock: Clock) -> None:
        self._model = model
        self._opener = opener
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._clock = clock
        self._instances: dict[str, Instance] = {}
        self._sessions: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    @property
    def instances(self) -> tuple[Instance, ...]:
        """All that are registered, usable or not."""
        return tuple(self._instances.values())

    def usable(self, role: Role) -> list[Instance]:
        """Those that take new work."""
        return [it for it in self._instances.values() if it.status.role is role and it.accepts_work]

    def heartbeat(self, status: InstanceStatus) -> None:
        """Register an instance or keep it registered. Raises IncompatiblePeerError if it serves another model."""
        if status.model != self._model:
            raise IncompatiblePeerError(f"this router serves '{self._model}', not '{status.model}'")
        known = self._instances.get(status.instance_id)
        if known is not None and (known.status.address, known.role) == (status.address, status.role):
            known.report(status, self._clock.now_s())
        else:
            for other in self.instances:
                if other is known or other.status.address == status.address:
                    self._remove(other, "another instance has taken its place")
            self._instances[status.instance_id] = Instance(status, self._clock.now_s())
            logger.info("%s instance %s has joined", status.role.value, status.instance_id)
        self._changed.set()

    def pair_capacity_tokens(self) -> int:
        """Longest prompt plus answer that some usable pair can hold. Raises UnavailableError if there is no pair."""
        prefills, decodes = self.usable(Role.PREFILL), self.usable(Role.DECODE)
        for role, found in ((Role.PREFILL, prefills), (Role.DECODE, decodes)):
            if not found:
                raise UnavailableError(f"no {role.value} worker is ready")
        fitting = [
            min(prefill.capacity_tokens, decode.capacity_tokens)
            for prefill in prefills
            for decode in decodes
            if prefill.status.fingerprint == decode.status.fingerprint
        ]
        if not fitting:
            raise UnavailableError("no prefill worker is ready whose KV a ready decode worker can read")
        return max(fitting)

    def check_length(self, num_tokens: int) -> None:
        """Raises ContextLengthError if no usable pair holds a prompt that long and a token of answer, UnavailableError
        if there is no pair."""
        capacity_tokens = self.pair_capacity_tokens()
        if num_tokens >= capacity_tokens:
            raise ContextLengthError(
                f"the prompt has {num_tokens} tokens; the workers that are up hold at most {capacity_tokens} tokens of "
                "prompt and answer"
            )

    def has_pair(self) -> bool:
        """Whether a request could be served now."""
        try:
            return self.pair_capacity_tokens() > 0
        except UnavailableError:
            return False

    async def run(self) -> None:
        """Open and keep sessions, and drop the silent, until cancelled; then everything open fails."""
        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    self._drop_silent()
                    for instance in self.instances:
                        if instance.instance_id not in self._sessions and _wants_session(instance):
                            self._sessions[instance.instance_id] = group.create_task(self._keep_session(instance))
                    await self._wait_for_change()
        finally:
            for instance in self.instances:
                self._remove(instance, "the router is shutting down")

    async def _wait_for_change(self) -> None:
        try:
            async with asyncio.timeout(min(0.25, self._heartbeat_timeout_s / 10)):
                await self._changed.wait()
        except TimeoutError:
            pass
        self._changed.clear()

    def _drop_silent(self) -> None:
        oldest_s = self._clock.now_s() - self._heartbeat_timeout_s
        for instance in self.instances:
            if instance.heard_s < oldest_s:
                self._remove(instance, "it has fallen silent")

    def _remove(self, instance: Instance, why: str) -> None:
        del self._instances[instance.instance_id]
        logger.warning("%s instance %s is gone: %s", instance.role.value, instance.instance_id, why)
        if task := self._sessions.pop(instance.instance_id, None):
            task.cancel()
        instance.lose(UnavailableError(f"the {instance.role.value} worker is gone"))

    async def _keep_session(self, instance: Instance) -> None:
        """Keep one session open, with growing pauses between tries, until the instance is removed."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            try:
                session = await self._opener.open(instance.status)
                try:
                    instance.connect(session)
                    async for event in session.events():
                        instance.deliver(event)
                        backoff_s = FIRST_BACKOFF_S
                finally:
                    instance.lose(UnavailableError(f"the {instance.role.value} worker is gone"))
                    await session.close()
            except TandemError as error:
                logger.warning("session with %s is over: %s", instance.instance_id, error.message)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, LAST_BACKOFF_S)


def _wants_session(instance: Instance) -> bool:
    return instance.status.state is not InstanceState.LOADING
