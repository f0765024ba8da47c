"""The commands and events between a router and an instance, as values. `wire` converts them to and from messages.

A router keeps one session (a two-way stream) open to each instance. A `handle` is a number that the router chooses,
unique in the session, and names one attempt of one request. When the session ends, the instance drops all requests of
that session.

    Submit                     kv      hand_over   the instance
    prefill for another        None    True        computes the prompt, holds the KV for the reader
    decode                     source  False       fetches the KV, decodes
    both phases here           None    False       computes the prompt, decodes

    router                 instance                        router                 instance
      | Submit(hand_over) -> |                               | Submit(kv) --------> |  queue, reserve blocks
      |<- PrefillStarted     |  the router now chooses       |<- KvReserved         |
      |                      |  where to decode              |                      |  fetch the KV, verify, acknowledge
      |<- PrefillFinished    |  first token, KV held         |<- TransferCommitted  |
      | RenewLease --------> |  while the reader waits       |                      |
      | Cancel ------------> |  dropped in any phase         |<- TokenFrame         |  one a step
      |<- RequestFailed      |                               | Cancel ------------> |  dropped in any phase

A request with both phases on one instance gets PrefillStarted, PrefillFinished and then frames.
"""

import math
from dataclasses import dataclass, fields
from enum import Enum

from tandem.core.request import FinishReason, GenerationRequest, SampledToken, TokenLogprob
from tandem.core.step_coefficients import StepCoefficients


class Role(Enum):
    """Which requests an instance gets. An instance changes its role by configuration."""

    PREFILL = "prefill"
    DECODE = "decode"
    COLOCATED = "colocated"


class InstanceState(Enum):
    """LOADING -> READY -> DRAINING -> gone. A draining instance finishes what it has and takes nothing new.

    READY or DRAINING <-> STALLED: the step in progress is too old. What the instance has must go on elsewhere.
    """

    LOADING = "loading"
    READY = "ready"
    STALLED = "stalled"
    DRAINING = "draining"


# --- commands --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KvSource:
    """The instance that computes the KV of an attempt. The address comes from the fleet, never from a client."""

    instance_id: str
    address: str


@dataclass(frozen=True, slots=True)
class Submit:
    """Work on an attempt. `request.deadline_s` travels as a remaining time.

    `kv` None: the instance computes the prompt. `hand_over`: the KV of the prompt is then held for another instance.
    """

    handle: int
    request: GenerationRequest
    kv: KvSource | None = None
    hand_over: bool = False


@dataclass(frozen=True, slots=True)
class Cancel:
    """Drop the attempt in any phase, and free all that it holds. Unknown handles are ignored."""

    handle: int


@dataclass(frozen=True, slots=True)
class RenewLease:
    """The reader of the attempt's KV still waits: hold the KV for another `lease_s`. Ignored if no KV is held."""

    handle: int


SessionCommand = Submit | Cancel | RenewLease


# --- events ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PrefillStarted:
    """The first chunk of the prompt is in a step."""

    handle: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class PrefillFinished:
    """The first token of the attempt. `finish_reason` is set when this token is the last one: then no KV is held.

    `compute_s` ran from the first chunk's step to the token.
    """

    handle: int
    token: SampledToken
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    finish_reason: FinishReason | None
    num_cached_tokens: int
    compute_s: float


@dataclass(frozen=True, slots=True)
class KvReserved:
    """The instance has blocks for KV that comes from elsewhere."""

    handle: int


@dataclass(frozen=True, slots=True)
class TransferCommitted:
    """The KV has arrived whole and is owned by the reader. `transfer_s` ran from the end of the prefill to the
    acknowledgement. `streamed_bytes` of `transfer_bytes` had come before; the first of them `streamed_s` before."""

    handle: int
    transfer_s: float
    transfer_bytes: int
    transport: str
    streamed_bytes: int = 0
    streamed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class NewTokens:
    """Tokens of one request, after the first one of the attempt.

    `queue_s`, in the first frame after a transfer only, ran from the commit to the step.
    """

    handle: int
    tokens: tuple[SampledToken, ...]
    finish_reason: FinishReason | None = None
    queue_s: float | None = None


@dataclass(frozen=True, slots=True)
class TokenFrame:
    """The new tokens of one step, for one router."""

    items: tuple[NewTokens, ...]


@dataclass(frozen=True, slots=True)
class RequestFailed:
    """The attempt ended with an error; the instance has freed all that it held."""

    handle: int
    code: str
    message: str


SessionEvent = PrefillStarted | PrefillFinished | KvReserved | TransferCommitted | TokenFrame | RequestFailed


# --- heartbeat -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """KV blocks of one instance by owner. Invariant: they sum to the pool. `leaked` counts any that do not."""

    total: int
    free: int
    running: int  # of sequences being computed, or reserved for an arriving one
    cached: int  # of the prefix cache alone, reclaimable
    leased: int  # computed, held for a reader
    leaked: int = 0


BLOCK_OWNERS = tuple(field.name for field in fields(BlockCounts))


@dataclass(frozen=True, slots=True)
class LinkStats:
    """Totals of one link between two instances, since it was made. `streamed_bytes` of `transfer_bytes` came before
    their prefill was finished. `wire_bytes` were sent for them: none over shared memory, fewer with a `codec`
    (`core.kv_codec.KvCodec`; empty where an older instance does not tell)."""

    peer_id: str
    transport: str
    transfers: int
    transfer_bytes: int
    transfer_s: float
    failures: int
    streamed_bytes: int = 0
    wire_bytes: int = 0
    codec: str = "none"


@dataclass(frozen=True, slots=True)
class InstanceStatus:
    """The state of an instance, which every router gets with each heartbeat.

    `instance_id` is new at each start of the process, so that a restarted instance is never mistaken for the old one.
    `fingerprint` is the KV layout's, with the plan epoch if there is one: only instances with equal ones can be paired.
    `weights_hash` is of the model's files, a part of the fingerprint, for people; empty: unknown.
    `uncomputed_tokens` are prompt tokens that wait to be computed; `unreserved_tokens` are of requests whose KV comes
    from another instance and which have no blocks for it yet. KV for a reader is held for `lease_s` after its prefill
    or the last RenewLease. `step_age_s` is of the step in progress, 0 between two steps. `allocated_blocks` are those
    of the process's Python (`sys.getallocatedblocks`): they grow without end where something leaks.
    `step_cost` is what the instance expects of its steps, as corrected by those that it measured; None: it cannot tell.
    `step_prompt_tokens` are the prompt tokens that one step of it computes at most; 0: it does not tell.
    `certificate_not_after_s` is when its certificate expires, in seconds since 1970; None: it has none.
    `unreachable_peers` are instances whose KV it cannot fetch now, because it has lost its connection to them.
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
    uncomputed_tokens: int
    unreserved_tokens: int
    steps: int = 0
    step_s: float = 0.0
    computed_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    preemptions: int = 0
    lease_s: float = math.inf
    links: tuple[LinkStats, ...] = ()
    step_age_s: float = 0.0
    allocated_blocks: int = 0
    step_cost: StepCoefficients | None = None
    step_prompt_tokens: int = 0
    weights_hash: str = ""
    certificate_not_after_s: float | None = None
    unreachable_peers: tuple[str, ...] = ()
