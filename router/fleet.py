"""Who is alive: instances register by heartbeats, and the router keeps one session open to each.

    heartbeat --> registered --session opened--> usable (READY) --session broken--> registered, reconnecting
                      |                            |
                      +------- silence, or a new instance at the same address ---> gone: all its attempts fail

Time is passed in; the work happens in `run`.
"""

import asyncio
import logging
from collections.abc import Callable

from tandem.core.clock import Clock
from tandem.core.errors import ContextLengthError, IncompatiblePeerError, TandemError, UnavailableError
from tandem.core.session import InstanceState, InstanceStatus, Role
from tandem.router.instances import Instance, SessionOpener

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
        self._watchers: list[Callable[[Instance], None]] = []
        # What each usable instance offers: role, fingerprint, capacity in tokens. What pairs of them can hold at most
        # is worked out when this has changed.
        self._offers: dict[str, tuple[Role, str, int]] = {}
        self._pair_capacity_tokens: int | None = None

    def watch(self, watcher: Callable[[Instance], None]) -> None:
        """`watcher` is called with each instance now, and with an instance whenever its load, its status or whether it
        takes work has changed; of one that is gone once more. It must not block."""
        self._watchers.append(watcher)
        for instance in self.instances:
            watcher(instance)

    def get(self, instance_id: str) -> Instance | None:
        """If it is registered, usable or not."""
        return self._instances.get(instance_id)

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
            self._instances[status.instance_id] = Instance(status, self._clock.now_s(), self._on_change)
            logger.info("%s instance %s has joined", status.role.value, status.instance_id)
        self._changed.set()

    def pair_capacity_tokens(self) -> int:
        """Longest prompt plus answer that some usable pair can hold. Raises UnavailableError if there is no pair."""
        if self._pair_capacity_tokens is None:
            self._pair_capacity_tokens = self._find_pair_capacity_tokens()
        return self._pair_capacity_tokens

    def _find_pair_capacity_tokens(self) -> int:
        longest: dict[Role, dict[str, int]] = {Role.PREFILL: {}, Role.DECODE: {}}  # by fingerprint
        for role, fingerprint, capacity_tokens in self._offers.values():
            longest[role][fingerprint] = max(capacity_tokens, longest[role].get(fingerprint, 0))
        for role, found in longest.items():
            if not found:
                raise UnavailableError(f"no {role.value} worker is ready")
        prefills, decodes = longest[Role.PREFILL], longest[Role.DECODE]
        fitting = [min(prefills[it], decodes[it]) for it in prefills.keys() & decodes.keys()]
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

    def _on_change(self, instance: Instance) -> None:
        instance_id = instance.instance_id
        registered = self._instances.get(instance_id)
        if registered is not None and registered is not instance:
            return  # the last words of one whose place another has taken
        if registered is not None and instance.accepts_work:
            offer = (instance.role, instance.status.fingerprint, instance.capacity_tokens)
            if self._offers.get(instance_id) != offer:
                self._offers[instance_id] = offer
                self._pair_capacity_tokens = None
        elif self._offers.pop(instance_id, None) is not None:
            self._pair_capacity_tokens = None
        for watcher in self._watchers:
            watcher(instance)

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
