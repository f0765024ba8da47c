"""Sessions with workers over gRPC: one channel and one stream each."""

from collections.abc import AsyncIterator
from typing import Any

import grpc

from tandem.core.clock import Clock
from tandem.core.session import InstanceStatus, Role
from tandem.router.instances import WorkerCommand, WorkerEvent
from tandem.wire.channels import open_channel
from tandem.wire.sessions import DecodeSession, PrefillSession


class _ChannelSession:
    """A `WorkerSession` that owns its channel."""

    def __init__(self, channel: grpc.aio.Channel, session: Any) -> None:
        self._channel = channel
        self._session = session  # Any: of either role, which the fleet never confuses

    def send(self, command: WorkerCommand) -> None:
        self._session.send(command)

    def events(self) -> AsyncIterator[WorkerEvent]:
        events: AsyncIterator[WorkerEvent] = self._session.events()
        return events

    async def close(self) -> None:
        await self._session.close()
        await self._channel.close()


class GrpcSessions:
    """Opens sessions at the addresses that workers reported. A `SessionOpener`."""

    def __init__(self, token: str | None, clock: Clock, timeout_s: float = 5.0) -> None:
        self._token = token
        self._clock = clock
        self._timeout_s = timeout_s

    async def open(self, status: InstanceStatus) -> _ChannelSession:
        channel = open_channel(status.address)
        session_type = PrefillSession if status.role is Role.PREFILL else DecodeSession
        try:
            session = await session_type.open(channel, self._clock, self._timeout_s, self._token)
        except BaseException:
            await channel.close()
            raise
        return _ChannelSession(channel, session)
