"""Control channels to the prefill instances that KV is fetched from."""

import asyncio
from collections import OrderedDict

import grpc

from tandem.core.session import KvSource
from tandem.core.tls import ClusterTls
from tandem.wire.channels import open_channel
from tandem.wire.transfer import KvTransferClient

MAX_PEERS = 1024


class Peers:
    """One channel per prefill instance, made when first needed; beyond `MAX_PEERS` the one not used for longest goes.

    Keyed by instance, not by address: a restarted worker is another peer. A channel that is given up (its peer is gone,
    or there are too many) is closed only when no call is under way on it and no link is open, so that no fetch fails
    because of another fetch.
    """

    def __init__(self, token: str | None, tls: ClusterTls | None = None) -> None:
        self._token = token
        self._tls = tls
        self._peers: OrderedDict[str, tuple[KvTransferClient, grpc.aio.Channel]] = OrderedDict()
        self._given_up: list[tuple[KvTransferClient, grpc.aio.Channel]] = []
        self._closing: set[asyncio.Task[None]] = set()

    def control(self, source: KvSource) -> KvTransferClient:
        """Reaches that instance, over a new channel if the peer was gone."""
        self.forget(source.instance_id)
        if source.instance_id not in self._peers:
            self._close_unused()
            channel = open_channel(source.address, tls=self._tls)
            self._peers[source.instance_id] = KvTransferClient(channel, source.instance_id, self._token), channel
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
        channels = [channel for _, channel in [*self._peers.values(), *self._given_up]]
        self._peers.clear()
        self._given_up.clear()
        await asyncio.gather(*(channel.close() for channel in channels), *self._closing)

    def _close_unused(self) -> None:
        for instance_id in list(self._peers):
            self.forget(instance_id)
        for entry in [entry for entry in self._given_up if not entry[0].in_use]:
            self._given_up.remove(entry)
            closing = asyncio.create_task(entry[1].close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
