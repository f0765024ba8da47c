"""What a router and a worker say to each other, as values. `wire` turns them into messages and back.

A router keeps one session (a two-way stream) open to each worker. A `handle` is a number the router chooses, unique in
the session, that names one attempt of one request. When the session ends, the worker drops all its requests: a router
that dies leaves no orphans.

    prefill session                                     decode session
    router            prefill worker                    router            decode worker
      | SubmitPrefill ->|                                 | OpenDecode  -> |  queue, reserve blocks
      |<- PrefillStarted|  late binding: the router       |<- DecodeReserved
      |                 |  now opens the decode           |                |  pull the KV, verify, acknowledge
      |<- PrefillFinished  first token, KV held           |<- TransferCommitted
      | Cancel        ->|  drops it in any phase          |<- DecodeFrame  |  one per step, all requests' new tokens
      |<- RequestFailed |                                 | Cancel       ->|  drops it in any phase
"""

from dataclasses import dataclass
from enum import Enum

from tandem.core.request import FinishReason, GenerationRequest, SampledToken, TokenLogprob


class Role(Enum):
    PREFILL = "prefill"
    DECODE = "decode"


class InstanceState(Enum):
    """LOADING -> READY -> DRAINING -> gone. A draining instance finishes what it has and takes nothing new."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Cancel:
    """Drop the request in whatever phase it is, and free all that it holds. Unknown handles are ignored."""

    handle: int


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """The attempt ended with an error; the worker has freed all that it held."""

    handle: int
    code: str
    message: str


# --- prefill session -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SubmitPrefill:
    """`request.deadline_s` travels as a remaining time."""

    handle: int
    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class PrefillStarted:
    handle: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class PrefillFinished:
    """The first token of the attempt. `finish_reason` is set when it is also the last: then no KV is held.

    `queue_s` ran from the command's arrival to the first chunk's step, `compute_s` from there to the token.
    """

    handle: int
    token: SampledToken
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    finish_reason: FinishReason | None
    num_cached_tokens: int
    queue_s: float
    compute_s: float


PrefillCommand = SubmitPrefill | Cancel
PrefillEvent = PrefillStarted | PrefillFinished | RequestFailed


# --- decode session --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KvSource:
    """Where the KV of an attempt is computed. The address comes from the fleet registry, never from a client."""

    instance_id: str
    address: str


@dataclass(frozen=True, slots=True)
class OpenDecode:
    handle: int
    request: GenerationRequest
    source: KvSource


@dataclass(frozen=True, slots=True)
class DecodeReserved:
    handle: int


@dataclass(frozen=True, slots=True)
class TransferCommitted:
    """The KV has arrived whole and is owned by decode. `transfer_s` is the copy and its acknowledgement."""

    handle: int
    transfer_s: float
    transfer_bytes: int
    transport: str


@dataclass(frozen=True, slots=True)
class DecodeTokens:
    """New tokens of one request. `queue_s` (first frame of a request only) ran from commit to its first step."""

    handle: int
    tokens: tuple[SampledToken, ...]
    finish_reason: FinishReason | None = None
    queue_s: float | None = None


@dataclass(frozen=True, slots=True)
class DecodeFrame:
    """What one step brought for one router."""

    items: tuple[DecodeTokens, ...]
    step_s: float


DecodeCommand = OpenDecode | Cancel
DecodeEvent = DecodeReserved | TransferCommitted | DecodeFrame | RequestFailed


# --- heartbeat -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """KV blocks of one instance by owner. Invariant: they sum to the pool. `leaked` counts any that do not."""

    total: int
    free: int
    running: int  # of sequences being computed, or reserved for an arriving one
    cached: int  # of the prefix cache alone, reclaimable
    leased: int  # computed, waiting for decode to fetch them
    leaked: int = 0


@dataclass(frozen=True, slots=True)
class LinkStats:
    """Totals of one link between two instances, since it was made."""

    peer_id: str
    transport: str
    transfers: int
    transfer_bytes: int
    transfer_s: float
    failures: int


@dataclass(frozen=True, slots=True)
class InstanceStatus:
    """What a worker tells every router once per heartbeat.

    `instance_id` is new at each start of the process, so that a restarted worker is never mistaken for the old one.
    `fingerprint` is the KV layout's: only equal ones can be paired.
    """

    instance_id: str
    role: Role
    state: InstanceState
    address: str
    model: str
    fingerprint: str
    max_model_len: int
    block_size: int
    blocks: BlockCounts
    waiting_requests: int
    running_requests: int
    waiting_tokens: int
    steps: int = 0
    step_s: float = 0.0
    computed_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    preemptions: int = 0
    links: tuple[LinkStats, ...] = ()
