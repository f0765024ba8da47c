"""KV on its way: transfers share the links that they cross."""

import math
from collections.abc import Callable, Hashable
from typing import Any

from tandem.placement.simulator.deployment import InstanceSpec, NetworkSpec
from tandem.placement.simulator.event_queue import EventQueue


class Transfer:
    """One shipment in flight. `started_s` is when it was asked for."""

    __slots__ = ("argument", "end_number", "left_bytes", "links", "on_arrival", "rate", "started_s", "updated_s")

    def __init__(self, on_arrival: Callable[[Any], None], argument: Any, started_s: float, num_bytes: float) -> None:
        self.on_arrival = on_arrival
        self.argument = argument
        self.started_s = started_s
        self.left_bytes = num_bytes
        self.links: tuple[_Link, ...] = ()
        self.rate = 0.0
        self.updated_s = 0.0
        self.end_number = 0  # counts predictions of its end; only the last one holds. Below 0: abandoned


class _Link:
    __slots__ = ("bytes_per_s", "transfers")

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self.transfers: dict[Transfer, None] = {}  # in order of their start

    @property
    def share(self) -> float:
        return self.bytes_per_s / len(self.transfers)


class Network:
    """Moves KV between instances by `NetworkSpec`: a latency, then bytes at the lesser of the shares that the two
    links of its way have for it. Shares are recomputed whenever a transfer on the link starts or ends."""

    def __init__(self, spec: NetworkSpec, events: EventQueue) -> None:
        self._spec = spec
        self._events = events
        self._links: dict[Hashable, _Link] = {}

    def send(
        self,
        source: InstanceSpec,
        destination: InstanceSpec,
        num_tokens: int,
        on_arrival: Callable[[Any], None],
        argument: Any,
    ) -> Transfer:
        """Call `on_arrival(argument)` when the KV of `num_tokens` tokens has arrived; never before this returns."""
        spec, now_s = self._spec, self._events.now_s
        same_node = source.node == destination.node
        bytes_per_s = spec.intra_node_bytes_per_s if same_node else spec.inter_node_bytes_per_s
        fixed_s = spec.per_concurrent_transfer_s  # shares the links as bytes do
        fixed_bytes = fixed_s * bytes_per_s if fixed_s else 0.0
        resharding = spec.between(source.shape, destination.shape)
        latency_s = spec.latency_s + resharding.extra_s
        num_bytes = num_tokens * spec.kv_bytes_per_token * resharding.factor  # of a plain transfer that takes as long
        if spec.coding is not None and not same_node:
            num_bytes *= spec.coding.sent_share(num_tokens)
        transfer = Transfer(on_arrival, argument, now_s, fixed_bytes + num_bytes)
        if math.isinf(bytes_per_s) or transfer.left_bytes == 0:
            self._events.at(now_s + latency_s, self._arrive, transfer)
            return transfer
        ends = (source.instance_id, destination.instance_id) if same_node else (source.node, destination.node)
        transfer.links = (self._link(("out", ends[0]), bytes_per_s), self._link(("in", ends[1]), bytes_per_s))
        self._events.at(now_s + latency_s, self._start, transfer)
        return transfer

    def abandon(self, transfer: Transfer) -> None:
        """It never arrives, and leaves its links to the others."""
        self._leave(transfer)
        transfer.end_number = -1

    def _link(self, name: Hashable, bytes_per_s: float) -> _Link:
        link = self._links.get(name)
        if link is None:
            link = self._links[name] = _Link(bytes_per_s)
        return link

    def _start(self, transfer: Transfer) -> None:
        if transfer.end_number < 0:
            return
        transfer.updated_s = self._events.now_s
        for link in transfer.links:
            link.transfers[transfer] = None
        self._share_anew(transfer.links)

    def _leave(self, transfer: Transfer) -> None:
        for link in transfer.links:
            link.transfers.pop(transfer, None)
        self._share_anew(transfer.links)

    def _share_anew(self, links: tuple[_Link, ...]) -> None:
        now_s = self._events.now_s
        for transfer in dict.fromkeys(transfer for link in links for transfer in link.transfers):
            rate = min(link.share for link in transfer.links)
            if rate == transfer.rate:
                continue
            transfer.left_bytes -= transfer.rate * (now_s - transfer.updated_s)
            transfer.rate, transfer.updated_s = rate, now_s
            transfer.end_number += 1
            end_s = now_s + max(0.0, transfer.left_bytes) / rate
            self._events.at(end_s, self._end, (transfer, transfer.end_number))

    def _end(self, prediction: tuple[Transfer, int]) -> None:
        transfer, end_number = prediction
        if transfer.end_number == end_number:
            self._leave(transfer)
            self._arrive(transfer)

    def _arrive(self, transfer: Transfer) -> None:
        if transfer.end_number >= 0:
            transfer.on_arrival(transfer.argument)
