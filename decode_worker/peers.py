"""Control channels to the prefill instances that KV is fetched from."""

import asyncio
from collections import OrderedDict

import grpc

from tandem.core.session import KvSource
from tandem.wire.channels import open_channel
from tandem.wire.transfer import KvTransferClient

MAX_PEERS = 1024


class Peers:
    """One channel per prefill instance, made when first needed; beyond `MAX_PEERS` the one not used for longest goes.

    Keyed by instance, not by address: a restarted worker is another peer.
    """

    def __init__(self, token: str | None) -> None:
        self._token = token
        self._channels: OrderedDict[str, tuple[grpc.aio.Channel, KvTransferClient]] = OrderedDict()
        self._closing: set[asyncio.Task[None]] = set()

    def control(self, source: KvSource) -> KvTransferClient:
        entry = self._channels.get(source.instance_id)
        if entry is None:
            channel = open_channel(source.address)
            entry = channel, KvTransferClient(channel, source.instance_id, self._token)
            self._channels[source.instance_id] = entry
            if len(self._channels) > MAX_PEERS:
                self.forget(next(iter(self._channels)))
        self._channels.move_to_end(source.instance_id)
        return entry[1]

    def forget(self, instance_id: str) -> None:
        """The instance is gone."""
        if (entry := self._channels.pop(instance_id, None)) is not None:
            closing = asyncio.create_task(entry[0].close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        for instance_id in list(self._channels):
            self.forget(instance_id)
        await asyncio.gather(*self._closing)
