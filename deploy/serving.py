"""A cluster on this machine, from its start to its end, as `tandem serve` runs it."""

import asyncio
import secrets
from collections.abc import Mapping

import grpc

from tandem.core.clock import Clock
from tandem.core.config import InstanceSection, ServeConfig, with_secrets
from tandem.core.errors import ConfigError, UnavailableError
from tandem.core.session import InstanceState
from tandem.core.tls import ClusterTls
from tandem.deploy.controller import Controller, Launcher, Watch
from tandem.deploy.machine import this_machine
from tandem.deploy.topology import Machine, ProcessRole, plan_processes
from tandem.wire.channels import open_channel
from tandem.wire.fleet import FleetDescription, describe_fleet

_DESCRIBE_TIMEOUT_S = 2.0
_REGISTER_TIMEOUT_S = 15.0
_POLL_S = 0.05


def with_token(config: ServeConfig) -> ServeConfig:
    """The configuration with its cluster token, which is random if it has none. Raises ConfigError."""
    if config.cluster_token:
        return with_secrets(config)
    return config.model_copy(update={"cluster_token": secrets.token_urlsafe(32)})


def with_instances(config: ServeConfig, counts: Mapping[str, int]) -> ServeConfig:
    """The configuration with `counts[role]` instances of each role in `counts`.

    Raises ConfigError for a role without instances, or with several kinds of instances.
    """
    changes: dict[str, tuple[InstanceSection, ...]] = {}
    for role, count in counts.items():
        sections: tuple[InstanceSection, ...] = getattr(config, role, ())
        if len(sections) != 1:
            kinds = f"{len(sections)} kinds of {role} instances" if sections else f"no {role} instances"
            raise ConfigError(f"the cluster has {kinds}; only a role with one kind can be scaled")
        changes[role] = (sections[0].model_copy(update={"instances": count}),)
    return config.model_copy(update=changes)


def expected_transport(config: ServeConfig) -> str | None:
    """The transport that KV should use on one host; None if it depends on the devices."""
    transports = {section.transport for section in config.decode}
    if len(transports) == 1 and "auto" not in transports:
        return transports.pop()
    on_cpu = {section.engine.device for _, section in config.kinds} == {"cpu"}
    return "shared_memory" if transports == {"auto"} and (on_cpu or not this_machine().gpus) else None


class Serving:
    """The running cluster. `config` has its addresses, its token and the number of its instances."""

    def __init__(
        self, config: ServeConfig, machine: Machine, launcher: Launcher, clock: Clock, watch: Watch | None = None
    ) -> None:
        """`watch`: as the controller's."""
        self.config = config
        self.controller = Controller(launcher, clock, watch=watch)
        self._machine = machine
        self._clock = clock

    async def start(self, grace_s: float = 0.0) -> None:
        """Start the configured processes; returns when the router can reach all instances.

        Raises the first TandemError of a process that cannot start.
        """
        await self.controller.reconcile(plan_processes(self.config, self._machine), grace_s)
        await self._wait_registered()

    async def scale(self, counts: Mapping[str, int], grace_s: float) -> None:
        """Change the number of instances. Removed instances finish their requests for up to `grace_s`.

        Raises ConfigError as `with_instances`.
        """
        self.config = with_instances(self.config, counts)
        await self.start(grace_s)

    async def stop(self, grace_s: float) -> None:
        await self.controller.stop(grace_s)

    async def _wait_registered(self) -> None:
        until_s = self._clock.now_s() + _REGISTER_TIMEOUT_S
        channel = open_channel(self.config.router.control, self.config.cluster_token, self.config.cluster_tls)
        try:
            while not self._workers() <= await _ready_instances(channel):
                if self._clock.now_s() > until_s:
                    raise UnavailableError("the workers run, but do not reach the router's control address")
                await asyncio.sleep(_POLL_S)
        finally:
            await channel.close()

    def _workers(self) -> set[str]:
        return {p.instance_id for p in self.controller.running() if p.role is not ProcessRole.ROUTER}


async def _ready_instances(channel: grpc.aio.Channel) -> set[str]:
    try:
        fleet = await describe_fleet(channel, _DESCRIBE_TIMEOUT_S)
    except UnavailableError:
        return set()  # the router is starting
    return {status.instance_id for status in fleet.instances if status.state is InstanceState.READY}


async def fetch_fleet(
    control: str, token: str | None, tls: ClusterTls | None, *, with_profile: bool = False
) -> FleetDescription:
    """The router, its instances and, with `with_profile`, its requests, from the router's control address. Raises a
    TandemError."""
    channel = open_channel(control, token, tls)
    try:
        return await describe_fleet(channel, _DESCRIBE_TIMEOUT_S, with_profile=with_profile)
    finally:
        await channel.close()
