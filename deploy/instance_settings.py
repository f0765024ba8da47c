"""Tells running instances their routers and roles.

What each should know is compared with what it was told, several times a second, so it does not matter which of them was
started, moved, or could not be reached meanwhile, or that the controller itself is new.
"""

import asyncio
from collections.abc import Callable, Sequence

import grpc

from tandem.core.clock import Clock
from tandem.core.config import ServeConfig, WorkerConfig
from tandem.core.errors import TandemError
from tandem.core.session import Role
from tandem.deploy.running_process import ProcessInfo
from tandem.deploy.topology import ProcessSpec
from tandem.scheduling.budget import role_budget
from tandem.wire.channels import open_channel
from tandem.wire.sessions import RoleChange, configure_instance, set_routers

ROUTER_FORGOTTEN_S = 15.0  # an announced router that is not announced again
_ROUND_S = 0.5
_CALL_S = 2.0


class InstanceSettings:
    """Owns the list of announced routers. `running` gives the instances that run, `config` the cluster's settings.
    Without `tells_routers` instances find the routers by a name in DNS, as their own settings say."""

    def __init__(
        self,
        running: Callable[[], Sequence[tuple[ProcessSpec, ProcessInfo]]],
        config: Callable[[], ServeConfig],
        clock: Clock,
        *,
        tells_routers: bool = True,
    ) -> None:
        self._running = running
        self._config = config
        self._clock = clock
        self._tells_routers = tells_routers
        self._announced_s: dict[str, float] = {}  # by control address
        self._told: dict[str, tuple[RoleChange, tuple[str, ...]]] = {}  # by instance id

    def router_announced(self, control: str) -> None:
        self._announced_s[control] = self._clock.now_s()

    def routers(self) -> tuple[str, ...]:
        """Control addresses, that of the controller's own router first."""
        oldest_s = self._clock.now_s() - ROUTER_FORGOTTEN_S
        self._announced_s = {control: at_s for control, at_s in self._announced_s.items() if at_s >= oldest_s}
        config = self._config()
        own = (config.router.control,) if config.start_router else ()
        return tuple(dict.fromkeys((*own, *self._announced_s)))

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self.tell()
            await asyncio.sleep(_ROUND_S)

    async def tell(self) -> None:
        """One round. An instance that cannot be reached is told in the next one."""
        instances, routers = self._running(), self.routers() if self._tells_routers else ()
        ids = {info.instance_id for _, info in instances}
        self._told = {instance_id: told for instance_id, told in self._told.items() if instance_id in ids}
        await asyncio.gather(*(self._tell(spec, info, routers) for spec, info in instances))

    async def set_role(self, info: ProcessInfo, role: Role) -> None:
        """At once. Raises what the instance answers, UnavailableError if it cannot be reached."""
        async with self._open(info) as channel:
            await configure_instance(channel, RoleChange(role), _CALL_S)

    def _open(self, info: ProcessInfo) -> grpc.aio.Channel:
        config = self._config()
        return open_channel(info.address, config.cluster_token, config.cluster_tls)

    async def _tell(self, spec: ProcessSpec, info: ProcessInfo, routers: tuple[str, ...]) -> None:
        assert isinstance(spec.config, WorkerConfig), "routers have no role"
        change = role_change_of(spec.config)
        if self._told.get(info.instance_id) == (change, routers):
            return
        try:
            async with self._open(info) as channel:
                if routers:  # else none has announced itself yet, or none is to be told
                    await set_routers(channel, routers, _CALL_S)
                await configure_instance(channel, change, _CALL_S)
        except TandemError:
            return
        self._told[info.instance_id] = (change, routers)


def role_change_of(config: WorkerConfig) -> RoleChange:
    """Role and bounds of steps, all of them: an instance that was started with other settings takes those for the ones
    that are missing."""
    section = config.instance
    budget = role_budget(
        Role(config.role),
        max_batch=section.max_batch,
        max_queue=section.max_queue,
        max_batch_tokens=section.max_batch_tokens,
        max_prefill_tokens=section.max_prefill_tokens,
        mixing=section.policy,
    )
    return RoleChange(Role(config.role), budget.max_batch, budget.max_batch_tokens, budget.max_prefill_tokens)
