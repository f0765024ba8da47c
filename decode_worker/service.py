"""The decode worker on the event loop: routers' sessions, and one task per KV transfer."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from tandem.core.errors import CancelledError, InternalError, TandemError
from tandem.core.session import Cancel, DecodeCommand, DecodeEvent, OpenDecode
from tandem.core.transfer import PeerGoneError
from tandem.decode_worker.loop import Abandon, Arrived, Close, Fetch, FetchFailed, LoopCommand, LoopEvent, Open, Tell
from tandem.decode_worker.peers import Peers
from tandem.kv_transfer.receiver import KvReceiver
from tandem.wire.sessions import Outbox
from tandem.worker.attempt_key import Key

log = logging.getLogger(__name__)


class DecodeService:
    """Implements `wire.sessions.CommandHandler` for routers, and brings the KV that the loop asks for."""

    def __init__(self, post: Callable[[LoopCommand], None], peers: Peers) -> None:
        self._post = post
        self._peers = peers
        self._receiver: KvReceiver | None = None
        self._outboxes: dict[int, Outbox[DecodeEvent]] = {}
        self._next_session_id = 0
        self._keys: dict[int, set[Key]] = {}  # every attempt opened in a session and not yet closed by the router
        self._fetches: dict[Key, asyncio.Task[Arrived]] = {}

    def serve_with(self, receiver: KvReceiver) -> None:
        """Called once, before the first session: the receiver needs the loaded engine's pool."""
        self._receiver = receiver

    # --- routers (CommandHandler) ---

    def open_session(self, outbox: Outbox[DecodeEvent]) -> int:
        session_id = self._next_session_id
        self._next_session_id += 1
        self._outboxes[session_id] = outbox
        self._keys[session_id] = set()
        return session_id

    def handle(self, session_id: int, command: DecodeCommand) -> None:
        key = Key(session_id, command.handle)
        match command:
            case OpenDecode():
                self._keys[session_id].add(key)
                self._post(Open(key, command))
            case Cancel():
                self._keys[session_id].discard(key)
                self._post(Close(key))

    def close_session(self, session_id: int) -> None:
        """The router is gone: drop all its requests."""
        del self._outboxes[session_id]
        for key in self._keys.pop(session_id):
            self._post(Close(key))

    # --- the loop ---

    def deliver(self, events: list[LoopEvent]) -> None:
        """Events of one turn of the loop."""
        for event in events:
            match event:
                case Tell(session_id, session_event):
                    if (outbox := self._outboxes.get(session_id)) is not None:
                        outbox.put(session_event)
                case Fetch(key=key):
                    task = asyncio.create_task(self._fetch(event), name=f"fetch-{event.request_id}")
                    self._fetches[key] = task
                    task.add_done_callback(partial(self._fetch_ended, event))
                case Abandon(key):
                    if (abandoned := self._fetches.get(key)) is not None:
                        abandoned.cancel()

    async def _fetch(self, fetch: Fetch) -> Arrived:
        assert self._receiver is not None, "a session came before the receiver"
        source = fetch.source
        try:
            fetched = await self._receiver.fetch(
                self._peers.control(source),
                fetch.request_id,
                fetch.epoch,
                fetch.token_ids,
                fetch.block_ids,
                fetch.deadline_s,
            )
        except PeerGoneError:
            self._peers.forget(source.instance_id)
            self._receiver.drop(source.instance_id)
            raise
        return Arrived(fetch.key, fetched.first_token, fetched.seconds, fetched.bytes, fetched.transport)

    def _fetch_ended(self, fetch: Fetch, task: asyncio.Task[Arrived]) -> None:
        """Tell the loop, however it ended (a task cancelled before its first step runs none of its own code)."""
        del self._fetches[fetch.key]
        if task.cancelled():
            self._post(FetchFailed(fetch.key, CancelledError("the transfer was abandoned")))
            return
        match task.exception():
            case None:
                self._post(task.result())
            case TandemError() as error:
                log.info("transfer of %s (attempt %d) failed: %s", fetch.request_id, fetch.epoch, error.message)
                self._post(FetchFailed(fetch.key, error))
            case error:
                log.error("transfer of %s (attempt %d) failed", fetch.request_id, fetch.epoch, exc_info=error)
                self._post(FetchFailed(fetch.key, InternalError("the KV transfer failed; the worker's log says why")))

    async def close(self) -> None:
        """Abandon all transfers and wait until they have left their blocks."""
        for task in list(self._fetches.values()):
            task.cancel()
        await asyncio.gather(*self._fetches.values(), return_exceptions=True)
        await self._peers.close()
