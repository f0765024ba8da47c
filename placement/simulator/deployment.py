"""What the simulator runs: instances with their cost models, on nodes joined by links. Plans become this."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tandem.core.cost_model import CostModel, StepLoad
from tandem.core.instance_section import RoleName
from tandem.core.kv_codec import KvCodec
from tandem.core.parallel import ParallelShape
from tandem.core.request_slo import RequestSlo
from tandem.core.step_coefficients import StepCoefficients
from tandem.placement.costs.resharding import Resharding, ShapePair
from tandem.scheduling.budget import Mixing
from tandem.scheduling.chunk import Chunk
from tandem.scheduling.fast_forward_scheduler import FastForwardScheduler
from tandem.scheduling.instance_selector import InstanceSelector
from tandem.scheduling.routing_settings import RoutingSettings
from tandem.scheduling.step_load import step_load

_ONE_RANK = ParallelShape()
_NO_RESHARDING = Resharding(extra_s=0.0, factor=1.0)

PAUSE_S = 0.03
"""From when on a worker that had nothing to do has paused."""


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    """One instance. `num_blocks` blocks of `block_size` tokens are its KV pool. `max_batch_tokens` bounds the prompt
    tokens of one step (prefill, colocated), `max_batch` the sequences decoded in one step. `node` is where its first
    device stands, `shape` how its KV is divided. `request_admission_cost_s` is the extra time of a decode step for each
    request admitted during it; `cold_step_factor` the extra time of prefill's first step after a pause, as a share of
    the step. `lease_s` is how long computed KV is held for a reader. `growth_horizon_tokens` None: the role's own
    (`scheduling.budget`). `max_prefill_tokens` bounds the prompt tokens beside those that decode, None: the role's own.
    `step_cost` is what the instance believes of `cost` at first, and what the router is told; None: it cannot tell, and
    spends no slack. `scheduler_type` and `load_of`, what a step's chunks cost, are those of other systems where these
    are simulated."""

    instance_id: str
    role: RoleName
    cost: CostModel
    num_blocks: int
    block_size: int = 16
    max_model_len: int = 1 << 20
    max_batch_tokens: int = 8192
    max_prefill_tokens: int | None = None
    max_batch: int = 256
    max_queue: int = 1 << 30
    policy: Mixing = "chunked"
    prefix_cache: bool = True
    node: int = 0
    shape: ParallelShape = _ONE_RANK
    growth_horizon_tokens: int | None = None
    lease_s: float = float("inf")
    request_admission_cost_s: float = 0.0
    cold_step_factor: float = 0.0
    scheduler_type: type[FastForwardScheduler] = FastForwardScheduler
    load_of: Callable[[list[Chunk]], StepLoad] = step_load
    step_cost: StepCoefficients | None = None


@dataclass(frozen=True, slots=True)
class KvCoding:
    """How KV is coded between nodes, of heads of `head_dim` numbers of `element_bytes` bytes in blocks of
    `block_size` tokens. The time of coding is not known here: it is a share of that of sending (docs/log.md)."""

    codec: KvCodec
    block_size: int
    head_dim: int
    element_bytes: float

    def sent_share(self, num_tokens: int) -> float:
        """Of the bytes in memory."""
        return self.codec.sent_share(num_tokens, self.block_size, self.head_dim, self.element_bytes)


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """KV links. A transfer of n tokens takes `latency_s` + `per_concurrent_transfer_s` + n * `kv_bytes_per_token` /
    bandwidth, and all but the latency is shared: a node's outgoing link, its incoming link, and inside a node each
    instance's own port, are divided equally among the transfers on them. With infinite bandwidth a transfer takes
    `latency_s`. Between two shapes in `resharding` it takes as much longer as that says. Between nodes KV is coded as
    `coding` says."""

    kv_bytes_per_token: float = 0.0
    intra_node_bytes_per_s: float = float("inf")
    inter_node_bytes_per_s: float = float("inf")
    latency_s: float = 0.0
    per_concurrent_transfer_s: float = 0.0  # time of its links that a transfer takes whatever its bytes
    resharding: Mapping[ShapePair, Resharding] = field(default_factory=dict)
    coding: KvCoding | None = None

    def between(self, source: ParallelShape, destination: ParallelShape) -> Resharding:
        return self.resharding.get((source, destination), _NO_RESHARDING) if self.resharding else _NO_RESHARDING


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """Fixed times that the router and the wire add. `same_node_only`: decode is chosen on the prefill instance's node.
    `slo` are the classes that requests name by their index; a request beyond them has no targets. `routing` are the
    settings of the routing machine; without a limit of outstanding tokens no request waits in the router.
    `selector_type` is that of another system, if it is simulated.

    `admission_s`: received until the prefill worker has it. `first_token_s` and `token_s`: from the worker to the
    client. A request that has not ended `request_timeout_s` after its arrival ends then, without an answer.
    """

    admission_s: float = 0.0
    first_token_s: float = 0.0
    token_s: float = 0.0
    same_node_only: bool = False
    request_timeout_s: float = float("inf")
    slo: tuple[RequestSlo, ...] = ()
    routing: RoutingSettings = field(default_factory=RoutingSettings)
    selector_type: type[InstanceSelector] | None = None


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
