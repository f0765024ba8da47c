"""What the simulator runs: instances with their cost models, on nodes joined by links. Plans become this."""

from dataclasses import dataclass, field
from typing import Literal

from tandem.core.cost_model import CostModel

Role = Literal["prefill", "decode", "colocated"]
ColocatedPolicy = Literal["chunked", "prompt_first", "padded"]
PAUSE_S = 0.03
"""From when on a worker that had nothing to do has paused."""


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    """One instance. `num_blocks` blocks of `block_size` tokens are its KV pool. `max_batch_tokens` bounds the prompt
    tokens of one step (prefill, colocated), `max_batch` the sequences decoded in one step. `node` is where its first
    device stands. `open_s` is how much longer decode's step takes for each request that is opened meanwhile;
    `wake_share` how much longer, relatively, prefill's takes after a pause."""

    instance_id: str
    role: Role
    cost: CostModel
    num_blocks: int
    block_size: int = 16
    max_model_len: int = 1 << 20
    max_batch_tokens: int = 8192
    max_batch: int = 256
    max_queue: int = 1 << 30
    policy: ColocatedPolicy = "chunked"
    prefix_cache: bool = True
    node: int = 0
    growth_horizon_tokens: int = 256
    open_s: float = 0.0
    wake_share: float = 0.0


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """KV links. A transfer of n tokens takes `latency_s` + `turn_s` + n * `kv_bytes_per_token` / bandwidth, and all but
    the latency is shared: a node's outgoing link, its incoming link, and inside a node each instance's own port, are
    divided equally among the transfers on them. Infinite bandwidth means that a transfer takes `latency_s`."""

    kv_bytes_per_token: float = 0.0
    intra_node_bytes_per_s: float = float("inf")
    inter_node_bytes_per_s: float = float("inf")
    latency_s: float = 0.0
    turn_s: float = 0.0  # of a link, for what a transfer takes beside its bytes


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """Fixed times that the router and the wire add. `same_node_only`: decode is chosen on the prefill instance's node.

    `admission_s`: received until the prefill worker has it. `first_token_s` and `token_s`: from the worker to the
    client. A request that has not ended `request_timeout_s` after its arrival ends then, without an answer.
    """

    admission_s: float = 0.0
    first_token_s: float = 0.0
    token_s: float = 0.0
    same_node_only: bool = False
    request_timeout_s: float = float("inf")


@dataclass(frozen=True, slots=True)
class Failure:
    """`instance_id` is gone during [`at_s`, `until_s`): its requests start anew elsewhere, as the router does it
    live."""

    instance_id: str
    at_s: float
    until_s: float = float("inf")


@dataclass(frozen=True, slots=True)
class Deployment:
    instances: tuple[InstanceSpec, ...]
    network: NetworkSpec = field(default_factory=NetworkSpec)
    router: RouterSpec = field(default_factory=RouterSpec)
    failures: tuple[Failure, ...] = ()
