"""Workers that answer at once over real gRPC, without a model: for what the router does around requests."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from tandem.core.clock import SystemClock
from tandem.core.errors import TandemError
from tandem.core.request import FinishReason, GenerationRequest, SampledToken
from tandem.core.session import (
    Cancel,
    KvReserved,
    NewTokens,
    PrefillFinished,
    PrefillStarted,
    Role,
    SessionCommand,
    TokenFrame,
    TransferCommitted,
)
from tandem.v1 import worker_pb2_grpc
from tandem.wire.channels import open_channel
from tandem.wire.fleet import send_heartbeat
from tandem.wire.server import bind, build_server
from tandem.wire.sessions import InstanceServicer, Outbox, RoleChange
from tests.router.fakes import make_status

TOKEN_ID = 65


def _first(request: GenerationRequest, handle: int) -> PrefillFinished:
    is_last = request.sampling.max_tokens - request.num_output_tokens == 1
    reason = FinishReason.LENGTH if is_last else None
    return PrefillFinished(handle, SampledToken(TOKEN_ID), None, reason, 0, 0.0)


@dataclass
class InstantPrefill:
    outboxes: list[Outbox] = field(default_factory=list)
    is_silent: bool = False
    cancelled: list[int] = field(default_factory=list)

    def open_session(self, outbox: Outbox) -> int:
        self.outboxes.append(outbox)
        return len(self.outboxes) - 1

    def handle(self, session_id: int, command: SessionCommand) -> None:
        if isinstance(command, Cancel):
            self.cancelled.append(command.handle)
        elif not self.is_silent:
            self.outboxes[session_id].put(PrefillStarted(command.handle, 0))
            self.outboxes[session_id].put(_first(command.request, command.handle))

    def close_session(self, session_id: int) -> None:
        self.outboxes[session_id].close()

    def configure(self, change: RoleChange) -> None:
        raise NotImplementedError

    def set_routers(self, control_addresses: Sequence[str]) -> None:
        raise NotImplementedError


@dataclass
class InstantDecode:
    """Sends `frame_tokens` tokens in each frame, one frame after the other, all requests at their own pace."""

    outboxes: list[Outbox] = field(default_factory=list)
    frame_tokens: int = 4

    def open_session(self, outbox: Outbox) -> int:
        self.outboxes.append(outbox)
        return len(self.outboxes) - 1

    def handle(self, session_id: int, command: SessionCommand) -> None:
        if isinstance(command, Cancel):
            return
        outbox, handle = self.outboxes[session_id], command.handle
        outbox.put(KvReserved(handle))
        outbox.put(TransferCommitted(handle, 0.0, 1, "shared_memory"))
        left = command.request.sampling.max_tokens - command.request.num_output_tokens - 1
        while left > 0:
            count = min(left, self.frame_tokens)
            left -= count
            reason = None if left else FinishReason.LENGTH
            outbox.put(TokenFrame((NewTokens(handle, (SampledToken(TOKEN_ID),) * count, reason, 0.0),)))

    def close_session(self, session_id: int) -> None:
        self.outboxes[session_id].close()

    def configure(self, change: RoleChange) -> None:
        raise NotImplementedError

    def set_routers(self, control_addresses: Sequence[str]) -> None:
        raise NotImplementedError


@dataclass
class Pair:
    prefill: InstantPrefill
    decode: InstantDecode


@asynccontextmanager
async def serve_pair(control_address: str, model: str, token: str | None = None) -> AsyncIterator[Pair]:
    """A prefill and a decode worker that report to the router at `control_address` until the end of the block."""
    pair = Pair(InstantPrefill(), InstantDecode())
    clock = SystemClock()
    server, _ = build_server(token)
    worker_pb2_grpc.add_InstanceServiceServicer_to_server(InstanceServicer(pair.prefill, clock), server)
    other, _ = build_server(token)
    worker_pb2_grpc.add_InstanceServiceServicer_to_server(InstanceServicer(pair.decode, clock), other)
    statuses = [
        make_status(f"{role.value}-1", role, model=model, address=bind(its_server, "127.0.0.1:0"))
        for role, its_server in ((Role.PREFILL, server), (Role.DECODE, other))
    ]
    await server.start()
    await other.start()

    async def report() -> None:
        async with open_channel(control_address, token) as channel:
            while True:
                for status in statuses:
                    with suppress(TandemError):
                        await send_heartbeat(channel, status, 1.0)
                await asyncio.sleep(0.05)

    reporting = asyncio.create_task(report())
    try:
        yield pair
    finally:
        reporting.cancel()
        await asyncio.gather(reporting, return_exceptions=True)
        await asyncio.gather(server.stop(None), other.stop(None))
