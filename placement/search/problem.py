"""The input of a search."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tandem.core.kv_codec import KvCodecName
from tandem.core.model_shape import ModelShape
from tandem.core.slo import SloClass
from tandem.core.slo_file import SearchSection
from tandem.placement.cluster import Cluster, nic_bytes_per_s, peer_bytes_per_s
from tandem.placement.costs.cost_source import CostSource
from tandem.placement.plan_deployment import coding_of
from tandem.placement.search.kinds import legal_shapes
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
    requests of the trace are in `requests`; `notes` are sentences about requests that are left out. `cache_tokens`: see
    `without_cached`. `kv_codec`: how KV is coded between nodes. `as_served`: simulations have the router that serves
    the plan. Else they have one that knows no targets and holds no request: the search compares deployments with that,
    as it takes less time, and looser targets never change what it does.

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
    cache_tokens: float = math.inf
    kv_codec: KvCodecName = "none"
    as_served: bool = False

    @property
    def node_types(self) -> tuple[NodeType, ...]:
        """The nodes of the cluster by type, in the cluster's order."""
        counts: dict[tuple[str, int], int] = {}
        for node in self.cluster.nodes:
            key = node.device.name, node.num_devices
            counts[key] = counts.get(key, 0) + 1
        return tuple(NodeType(device, devices, count) for (device, devices), count in counts.items())

    @property
    def one_rank_devices(self) -> frozenset[str]:
        """CPUs without a calibration: a catalogue cannot tell how ranks get on with each other on shared cores."""
        cluster = self.cluster
        cpus = (name for name, device in cluster.devices.items() if device.family == "cpu")
        return frozenset(cpus) - cluster.calibrations.keys()

    def of_window(self, window: Window) -> "Problem":
        """The problem of one window of the trace, as if it had a steady state. Rates remain those of the trace."""
        requests = window_stream(self.requests, window)
        whole = without_cached(self.requests, self.cache_tokens)
        computed = window_stream(whole, window).head(self.section.requests)
        return replace(self, requests=requests, computed=computed, windows=())

    def served(self) -> "Problem":
        """With simulations as the plan will be served."""
        return replace(self, as_served=True)

    def with_requests(self, count: int) -> "Problem":
        """With at most `count` requests per simulation and prediction."""
        count = min(count, self.section.requests)
        section = self.section.model_copy(update={"requests": count})
        return replace(self, section=section, computed=self.computed.head(count))

    def transfer_s_per_token(self, devices: Sequence[str], ranks: int, *, same_node: bool) -> float:
        """Seconds to transfer one token's KV between instances of at least `ranks` ranks without contention."""
        if same_node:
            speed = min(ranks * peer_bytes_per_s(self.cluster.devices[name]) for name in devices)
            return self.model.kv_bytes_per_token / speed
        per_node = self.cluster.devices_per_node
        speed = min(per_node[name] * nic_bytes_per_s(self.cluster.devices[name]) for name in devices)
        return self._sent_share * self.model.kv_bytes_per_token / speed

    @property
    def _sent_share(self) -> float:
        """Of the KV's bytes, between nodes: of a prompt of mean length."""
        coding = coding_of(self.kv_codec, self.model, self.model.kv_bytes_per_token)
        return 1.0 if coding is None else coding.sent_share(max(1, round(float(self.requests.prompt_tokens.mean()))))

    def price_per_hour(self, used: dict[str, int]) -> float:
        """USD; the number of devices if a device has no known price."""
        price = self.cluster.price_per_hour(used)
        return float(sum(used.values())) if price is None else price


def without_cached(requests: RequestStream, cache_tokens: float = math.inf) -> RequestStream:
    """The prompts without the prefix that a cache of `cache_tokens` tokens has, at least one token of each. The cache
    keeps what was used last; prompts that nobody shares take its memory, too."""
    if not np.any(requests.prefix_group >= 0):
        return requests
    cached: OrderedDict[int, int] = OrderedDict()  # tokens by group; by -1 - row for what only one request has
    held = 0
    prompts = requests.prompt_tokens.copy()
    rows = zip(
        requests.prefix_group.tolist(), requests.prefix_tokens.tolist(), requests.prompt_tokens.tolist(), strict=True
    )
    for row, (group, shared, tokens) in enumerate(rows):
        if group >= 0:
            known = cached.pop(group, 0)
            prompts[row] = max(1, tokens - min(known, shared))
            cached[group] = max(known, shared)
            held += cached[group] - known
        if tokens > shared:
            cached[-1 - row] = tokens - shared
            held += tokens - shared
        while held > cache_tokens:
            held -= cached.popitem(last=False)[1]
    return replace(requests, prompt_tokens=prompts, prefix_tokens=np.minimum(requests.prefix_tokens, prompts))


def cache_tokens_of(cluster: Cluster, source: CostSource, model: ModelShape, section: SearchSection) -> float:
    """An estimate of the tokens that the prefix caches of a cluster hold together: half of the KV memory of all its
    devices, in the legal shape with the most. Running sequences and decode instances have the other half; the router
    sends a prompt where its prefix is, so most prefixes are in one cache only."""
    tokens = 0.0
    for node in cluster.nodes:
        shapes = legal_shapes(model, section, node.num_devices)
        per_device = max((source.kv_tokens(node.device.name, shape) / shape.num_ranks for shape in shapes), default=0.0)
        tokens += node.num_devices * per_device
    return tokens / 2
