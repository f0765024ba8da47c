"""The input of a search."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tandem.core.model_shape import ModelShape
from tandem.core.slo import SloClass
from tandem.core.slo_file import SearchSection
from tandem.placement.cluster import Cluster, nic_bytes_per_s, peer_bytes_per_s
from tandem.placement.costs.cost_source import CostSource
from tandem.placement.workload.description import repeated_tokens
from tandem.placement.workload.requests import RequestStream
from tandem.placement.workload.windows import Window, window_stream


@dataclass(frozen=True, slots=True)
class NodeType:
    """`count` nodes, each with `devices` devices of type `device`."""

    device: str
    devices: int
    count: int

    @property
    def num_devices(self) -> int:
        return self.devices * self.count


@dataclass(frozen=True, slots=True)
class Problem:
    """Simulations use `requests`, at any rate. In `computed` the prompts lack the tokens that a prefix cache saves.
    `rate`: requests per second to serve, None for the highest rate. `cheapest`: find the cheapest part of the cluster
    that serves `rate`, not the highest goodput of the cluster. `windows` divide the requests of a trace, all of which
    are simulated; the targets must be met in windows that have the share `cover` of the time. `simulated_share` of the
    requests of the trace are in `requests`; `notes` are sentences about requests that are left out.

    Picklable: worker processes receive it.
    """

    model: ModelShape
    source: CostSource
    cluster: Cluster
    classes: tuple[SloClass, ...]
    section: SearchSection
    requests: RequestStream
    computed: RequestStream
    rate: float | None = None
    cheapest: bool = False
    windows: tuple[Window, ...] = ()
    cover: float = 1.0
    simulated_share: float = 1.0
    notes: tuple[str, ...] = ()

    @property
    def node_types(self) -> tuple[NodeType, ...]:
        """The nodes of the cluster by type, in the cluster's order."""
        counts: dict[tuple[str, int], int] = {}
        for node in self.cluster.nodes:
            key = node.device.name, node.num_devices
            counts[key] = counts.get(key, 0) + 1
        return tuple(NodeType(device, devices, count) for (device, devices), count in counts.items())

    def of_window(self, window: Window) -> "Problem":
        """The problem of one window of the trace, as if it had a steady state. Rates remain those of the trace."""
        requests = window_stream(self.requests, window)
        computed = without_cached(requests).head(self.section.requests)
        return replace(self, requests=requests, computed=computed, windows=())

    def transfer_s_per_token(self, devices: Sequence[str], ranks: int, *, same_node: bool) -> float:
        """Seconds to transfer one token's KV between instances of at least `ranks` ranks without contention."""
        if same_node:
            speed = min(ranks * peer_bytes_per_s(self.cluster.devices[name]) for name in devices)
        else:
            per_node = self.cluster.devices_per_node
            speed = min(per_node[name] * nic_bytes_per_s(self.cluster.devices[name]) for name in devices)
        return self.model.kv_bytes_per_token / speed

    def price_per_hour(self, used: dict[str, int]) -> float:
        """USD; the number of devices if a device has no known price."""
        price = self.cluster.price_per_hour(used)
        return float(sum(used.values())) if price is None else price


def without_cached(requests: RequestStream) -> RequestStream:
    """The prompts without the prefix that an earlier request of the group left in the cache; at least one token of a
    prompt remains."""
    prompts = np.maximum(1, requests.prompt_tokens - repeated_tokens(requests))
    return replace(requests, prompt_tokens=prompts, prefix_tokens=np.minimum(requests.prefix_tokens, prompts))
