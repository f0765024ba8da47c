"""Sessions with instances over gRPC: one channel and one stream each."""

from collections.abc import AsyncIterator

import grpc

from tandem.core.clock import Clock
from tandem.core.session import SessionCommand, SessionEvent
from tandem.wire.channels import open_channel
from tandem.wire.sessions import InstanceSession


class ChannelSession:
    """A session that owns its channel."""

    def __init__(self, channel: grpc.aio.Channel, session: InstanceSession) -> None:
        self._channel = channel
        self._session = session

    def send(self, command: SessionCommand) -> None:
        """Queue a command; never blocks. Raises UnavailableError once the session is closed."""
        self._session.send(command)

    def events(self) -> AsyncIterator[SessionEvent]:
        """In order. Raises UnavailableError when the instance is gone."""
        return self._session.events()

    async def close(self) -> None:
        await self._session.close()
        await self._channel.close()


class GrpcSessions:
    """Opens sessions at the addresses that instances reported."""

    def __init__(self, token: str | None, clock: Clock, timeout_s: float = 5.0) -> None:
        self._token = token
        self._clock = clock
        self._timeout_s = timeout_s

    async def open(self, address: str) -> ChannelSession:
        """Raises UnavailableError if the instance does not answer within a bounded time."""
        channel = open_channel(address)
        try:
            session = await InstanceSession.open(channel, self._clock, self._timeout_s, self._token)
        except BaseException:
            await channel.close()
            raise
        return ChannelSession(channel, session)
