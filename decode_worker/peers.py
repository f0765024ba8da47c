"""Control channels to the prefill instances that KV is fetched from, and which of these cannot be reached."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from functools import partial

import grpc

from tandem.core.clock import SystemClock
from tandem.core.errors import ConfigError
from tandem.core.session import KvSource
from tandem.core.tls import ClusterTls
from tandem.decode_worker.own_delays import OwnDelays
from tandem.wire.channels import KV_CHANNEL_OPTIONS, open_channel
from tandem.wire.transfer import KvTransferClient

log = logging.getLogger(__name__)

MAX_PEERS = 1024
MAX_UNREACHABLE = 64  # that are told; with more, the oldest are forgotten
CONNECT_TIMEOUT_S = 1.5
FIRST_PAUSE_S = 0.25  # between two tries to reach a peer again; doubles
LAST_PAUSE_S = 4.0
GIVE_UP_S = 600.0  # by then the peer has restarted, under another id
# A ping, or its answer, that this process was too late for: half of the time that an answer may take, lately enough to
# have been in the time of a ping (`wire.channels.KV_CHANNEL_OPTIONS`).
LATE_S = 0.4
LATE_WITHIN_S = 2.0
DOUBT_TIMEOUT_S = 0.5  # to connect then: requests wait for it


class Peers:
    """One channel per prefill instance, made when first needed; beyond `MAX_PEERS` the one not used for longest goes.

    Keyed by instance, not by address: a restarted worker is another peer. A channel that is given up (its peer is gone,
    or there are too many) is closed only when no call is under way on it and no link is open, so that no fetch fails
    because of another fetch.

    A peer to which the connection was lost is unreachable until a new one can be made, which is tried again and again:
    routers are told, and no request has to find out. So is a peer with which no link can be made.

        connected --lost--> unreachable --a connection, or a link, can be made--> connected
            |  ^                 ^
            |  +--it can--+      |
            +--lost while this process was late--> tried at once --it cannot--+
    """

    def __init__(
        self, token: str | None, tls: ClusterTls | None = None, unreachable_changed: Callable[[], None] | None = None
    ) -> None:
        """`unreachable_changed` is called whenever `unreachable` has another result."""
        self._token = token
        self._tls = tls
        self._unreachable_changed = unreachable_changed
        self._peers: OrderedDict[str, tuple[KvTransferClient, grpc.aio.Channel]] = OrderedDict()
        self._given_up: list[tuple[KvTransferClient, grpc.aio.Channel]] = []
        self._closing: set[asyncio.Task[None]] = set()
        self._unreachable: dict[str, asyncio.Task[None]] = {}  # each task tries to reach the instance
        self._doubted: dict[str, asyncio.Task[None]] = {}  # each task finds out whether the instance is unreachable
        self._delays = OwnDelays(SystemClock())
        self._watching: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def was_late(self) -> bool:
        """Whether a connection that was lost now may have been lost because this process did not run."""
        return self._delays.longest_s(LATE_WITHIN_S) >= LATE_S

    async def is_there(self, source: KvSource) -> bool:
        """Whether the instance, whose connection has ended, is there all the same: this process was late, and another
        connection can be made at once."""
        return self.was_late and await self._can_connect(source, DOUBT_TIMEOUT_S)

    def unreachable(self) -> tuple[str, ...]:
        """Ids of the instances to which there is no connection any more."""
        return tuple(self._unreachable)

    def control(self, source: KvSource) -> KvTransferClient:
        """Reaches that instance, over a new channel if the peer was gone."""
        if self._watching is None:
            self._watching = asyncio.create_task(self._delays.watch(), name="own-delays")
        self.forget(source.instance_id)
        if source.instance_id not in self._peers:
            self._close_unused()
            channel = self._open(source)
            lost = partial(self._lost, source)
            self._peers[source.instance_id] = KvTransferClient(channel, source.instance_id, self._token, lost), channel
            if len(self._peers) > MAX_PEERS:
                self._given_up.append(self._peers.popitem(last=False)[1])
        self._peers.move_to_end(source.instance_id)
        return self._peers[source.instance_id][0]

    def forget(self, instance_id: str) -> None:
        """Give up the channel to that instance if the instance is gone."""
        if (entry := self._peers.get(instance_id)) is not None and entry[0].is_gone:
            self._given_up.append(self._peers.pop(instance_id))

    async def close(self) -> None:
        """Close all channels; calls under way fail with PeerGoneError."""
        self._is_closed = True
        tries = [*self._unreachable.values(), *self._doubted.values()]
        if self._watching is not None:
            tries.append(self._watching)
        self._unreachable.clear()
        self._doubted.clear()
        for reaching in tries:
            reaching.cancel()
        channels = [channel for _, channel in [*self._peers.values(), *self._given_up]]
        self._peers.clear()
        self._given_up.clear()
        await asyncio.gather(*(channel.close() for channel in channels), *self._closing)
        await asyncio.gather(*tries, return_exceptions=True)

    def _open(self, source: KvSource) -> grpc.aio.Channel:
        return open_channel(source.address, tls=self._tls, channel_options=KV_CHANNEL_OPTIONS)

    def _close_unused(self) -> None:
        for instance_id in list(self._peers):
            self.forget(instance_id)
        for entry in [entry for entry in self._given_up if not entry[0].in_use]:
            self._given_up.remove(entry)
            closing = asyncio.create_task(entry[1].close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    # --- peers that cannot be reached --------------------------------------------------------------------------------

    def cannot_link(self, source: KvSource, can_link: Callable[[KvTransferClient], Awaitable[bool]]) -> None:
        """No link can be made with that instance, though it answers: as if it were unreachable, until one can be."""
        self._cannot_reach(source, lambda: can_link(self.control(source)))

    def _lost(self, source: KvSource) -> None:
        instance_id = source.instance_id
        if not self.was_late:
            self._cannot_reach(source, partial(self._can_connect, source))
        elif not self._is_closed and instance_id not in (*self._unreachable, *self._doubted):
            log.info("the connection to %s ended while this process was late: it is tried again", instance_id)
            checking = asyncio.create_task(self._check(source), name=f"check-{instance_id}")
            self._doubted[instance_id] = checking
            checking.add_done_callback(lambda _: self._doubted.pop(instance_id, None))

    async def _check(self, source: KvSource) -> None:
        if not await self._can_connect(source, DOUBT_TIMEOUT_S):
            self._cannot_reach(source, partial(self._can_connect, source))

    def _cannot_reach(self, source: KvSource, can_reach: Callable[[], Awaitable[bool]]) -> None:
        instance_id = source.instance_id
        if self._is_closed or instance_id in self._unreachable:
            return
        if len(self._unreachable) >= MAX_UNREACHABLE:
            self._unreachable.pop(next(iter(self._unreachable))).cancel()
        log.warning("%s cannot be reached at %s: no KV comes from there", instance_id, source.address)
        reaching = asyncio.create_task(self._reach_again(source, can_reach), name=f"reach-{instance_id}")
        self._unreachable[instance_id] = reaching
        reaching.add_done_callback(partial(self._reached, instance_id))
        self._tell()

    async def _reach_again(self, source: KvSource, can_reach: Callable[[], Awaitable[bool]]) -> None:
        """Until it can be reached, or has been given up."""
        pause_s = FIRST_PAUSE_S
        try:
            async with asyncio.timeout(GIVE_UP_S):
                while True:
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, LAST_PAUSE_S)
                    if await can_reach():
                        log.info("%s can be reached again", source.instance_id)
                        return
        except TimeoutError:
            log.info("%s was not reached for %.0f s: it is forgotten", source.instance_id, GIVE_UP_S)

    async def _can_connect(self, source: KvSource, timeout_s: float = CONNECT_TIMEOUT_S) -> bool:
        try:
            channel = self._open(source)
        except ConfigError:  # the files of TLS are being replaced
            return False
        try:
            async with asyncio.timeout(timeout_s):
                await channel.channel_ready()
            return True
        except TimeoutError:
            return False
        finally:
            await channel.close()

    def _reached(self, instance_id: str, reaching: asyncio.Task[None]) -> None:
        if self._unreachable.get(instance_id) is reaching:
            del self._unreachable[instance_id]
            self._tell()

    def _tell(self) -> None:
        if self._unreachable_changed is not None:
            self._unreachable_changed()
