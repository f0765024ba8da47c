"""What a router says of its instances, on its control port."""

import asyncio
from collections.abc import Callable, Set

import grpc

from tandem.core.clock import Clock
from tandem.core.errors import DeadlineError, UnavailableError
from tandem.core.session import InstanceState
from tandem.core.tls import ClusterTls
from tandem.wire.channels import open_channel
from tandem.wire.fleet import FleetDescription, describe_fleet

_DESCRIBE_TIMEOUT_S = 2.0
_REGISTER_TIMEOUT_S = 15.0
_POLL_S = 0.05


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


async def wait_registered(
    control: str, token: str | None, tls: ClusterTls | None, instance_ids: Callable[[], Set[str]], clock: Clock
) -> None:
    """Until the router has a READY report of all instances, whose ids may change meanwhile. Raises UnavailableError."""
    until_s = clock.now_s() + _REGISTER_TIMEOUT_S
    channel = open_channel(control, token, tls)
    try:
        while not instance_ids() <= await _ready_instances(channel):
            if clock.now_s() > until_s:
                raise UnavailableError("the workers run, but do not reach the router's control address")
            await asyncio.sleep(_POLL_S)
    finally:
        await channel.close()


async def _ready_instances(channel: grpc.aio.Channel) -> Set[str]:
    try:
        fleet = await describe_fleet(channel, _DESCRIBE_TIMEOUT_S)
    except (UnavailableError, DeadlineError):
        return set()  # the router is starting
    return {status.instance_id for status in fleet.instances if status.state is InstanceState.READY}
