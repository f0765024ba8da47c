"""A prefill and a decode worker without a model, with the step times of an engine, to measure the cost of a router.

`python -m bench.overhead.scripted_workers CONTROL MODEL TOKEN STEP_S` reports both to the router at CONTROL until its
standard input ends. Prefill answers at once. Decode sends a frame every STEP_S, with one token of every request, as a
real worker does. Like an engine, it does not make up for a late frame.
"""

import asyncio
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress

from tandem.core.clock import SystemClock
from tandem.core.config import WorkerConfig
from tandem.core.errors import TandemError
from tandem.core.request import FinishReason, GenerationRequest, SampledToken
from tandem.core.session import (
    BlockCounts,
    Cancel,
    InstanceState,
    InstanceStatus,
    KvReserved,
    NewTokens,
    PrefillFinished,
    PrefillStarted,
    RenewLease,
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

_HEARTBEAT_S = WorkerConfig.model_fields["heartbeat_s"].default
_LETTERS = range(40, 72)  # one letter each in byte-level vocabularies whose first ids are the bytes


def _token(index: int) -> SampledToken:
    return SampledToken(_LETTERS[index % len(_LETTERS)])


def _num_left(request: GenerationRequest) -> int:
    return request.sampling.max_tokens - request.num_output_tokens


class ScriptedInstance:
    """A `wire.sessions.CommandHandler`: the first token comes at once, then a frame per step for every session, as long
    as `run` runs."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._outboxes: list[Outbox] = []
        self._left: defaultdict[int, dict[int, int]] = defaultdict(dict)  # session -> handle -> remaining tokens

    def open_session(self, outbox: Outbox) -> int:
        self._outboxes.append(outbox)
        return len(self._outboxes) - 1

    def handle(self, session_id: int, command: SessionCommand) -> None:
        handle, outbox = command.handle, self._outboxes[session_id]
        if isinstance(command, Cancel):
            self._left[session_id].pop(handle, None)
        elif isinstance(command, RenewLease):
            pass  # the transfer is committed at once
        elif command.kv is None:
            reason = FinishReason.LENGTH if _num_left(command.request) == 1 else None
            outbox.put(PrefillStarted(handle, 0))
            outbox.put(PrefillFinished(handle, _token(0), None, reason, 0, 0.0))
        else:
            outbox.put(KvReserved(handle))
            outbox.put(TransferCommitted(handle, 0.0, 1, "scripted"))
            self._left[session_id][handle] = _num_left(command.request) - 1

    def close_session(self, session_id: int) -> None:
        self._left.pop(session_id, None)

    def configure(self, change: RoleChange) -> None:
        """Nothing depends on the role."""

    def set_routers(self, control_addresses: Sequence[str]) -> None:
        """It always reports to the same."""

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        step_at_s = loop.time()
        while True:
            step_at_s = max(step_at_s + self._step_s, loop.time())
            await asyncio.sleep(step_at_s - loop.time())
            for session_id, left in self._left.items():
                if left:
                    self._outboxes[session_id].put(TokenFrame(self._step(left)))

    def _step(self, left: dict[int, int]) -> tuple[NewTokens, ...]:
        items = []
        for handle, num_tokens in list(left.items()):
            left[handle] = num_tokens - 1
            if num_tokens == 1:
                del left[handle]
            reason = FinishReason.LENGTH if num_tokens == 1 else None
            items.append(NewTokens(handle, (_token(num_tokens),), reason))
        return tuple(items)


def _status(role: Role, model: str, address: str) -> InstanceStatus:
    return InstanceStatus(
        instance_id=f"scripted-{role.value}",
        role=role,
        state=InstanceState.READY,
        address=address,
        model=model,
        fingerprint="scripted",
        max_model_len=1 << 20,
        block_size=16,
        blocks=BlockCounts(total=1 << 16, free=1 << 16, running=0, cached=0, leased=0),
        waiting_requests=0,
        running_requests=0,
        uncomputed_tokens=0,
        unreserved_tokens=0,
    )


async def _serve(control: str, model: str, token: str, step_s: float) -> None:
    clock, decode = SystemClock(), ScriptedInstance(step_s)
    prefill_server, _ = build_server(token)
    worker_pb2_grpc.add_InstanceServiceServicer_to_server(
        InstanceServicer(ScriptedInstance(step_s), clock), prefill_server
    )
    decode_server, _ = build_server(token)
    worker_pb2_grpc.add_InstanceServiceServicer_to_server(InstanceServicer(decode, clock), decode_server)
    statuses = (
        _status(Role.PREFILL, model, bind(prefill_server, "127.0.0.1:0")),
        _status(Role.DECODE, model, bind(decode_server, "127.0.0.1:0")),
    )
    await prefill_server.start()
    await decode_server.start()
    background = [asyncio.create_task(decode.run()), asyncio.create_task(_report(control, token, statuses))]
    await asyncio.to_thread(sys.stdin.read)
    for task in background:
        task.cancel()
    await asyncio.gather(*background, return_exceptions=True)
    await asyncio.gather(prefill_server.stop(None), decode_server.stop(None))


async def _report(control: str, token: str, statuses: Sequence[InstanceStatus]) -> None:
    async with open_channel(control, token) as channel:
        while True:
            for status in statuses:
                with suppress(TandemError):  # a busy router gets the next one
                    await send_heartbeat(channel, status, 1.0)
            await asyncio.sleep(_HEARTBEAT_S)


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])))
