from tandem.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_PREFILL: _ClassVar[Role]
    ROLE_DECODE: _ClassVar[Role]
    ROLE_COLOCATED: _ClassVar[Role]

class InstanceState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    INSTANCE_STATE_UNSPECIFIED: _ClassVar[InstanceState]
    INSTANCE_STATE_LOADING: _ClassVar[InstanceState]
    INSTANCE_STATE_READY: _ClassVar[InstanceState]
    INSTANCE_STATE_DRAINING: _ClassVar[InstanceState]
    INSTANCE_STATE_STALLED: _ClassVar[InstanceState]
ROLE_UNSPECIFIED: Role
ROLE_PREFILL: Role
ROLE_DECODE: Role
ROLE_COLOCATED: Role
INSTANCE_STATE_UNSPECIFIED: InstanceState
INSTANCE_STATE_LOADING: InstanceState
INSTANCE_STATE_READY: InstanceState
INSTANCE_STATE_DRAINING: InstanceState
INSTANCE_STATE_STALLED: InstanceState

class SloTargets(_message.Message):
    __slots__ = ("name", "ttft_s", "tpot_s", "max_gap_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TTFT_S_FIELD_NUMBER: _ClassVar[int]
    TPOT_S_FIELD_NUMBER: _ClassVar[int]
    MAX_GAP_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    ttft_s: float
    tpot_s: float
    max_gap_s: float
    def __init__(self, name: _Optional[str] = ..., ttft_s: _Optional[float] = ..., tpot_s: _Optional[float] = ..., max_gap_s: _Optional[float] = ...) -> None: ...

class AttemptRequest(_message.Message):
    __slots__ = ("request_id", "epoch", "token_ids", "num_output_tokens", "sampling", "cache_salt", "timeout_s", "slo")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    SLO_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_output_tokens: int
    sampling: _common_pb2.SamplingParams
    cache_salt: str
    timeout_s: float
    slo: SloTargets
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., num_output_tokens: _Optional[int] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParams, _Mapping]] = ..., cache_salt: _Optional[str] = ..., timeout_s: _Optional[float] = ..., slo: _Optional[_Union[SloTargets, _Mapping]] = ...) -> None: ...

class SampledToken(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: _common_pb2.TokenLogprob
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[_Union[_common_pb2.TokenLogprob, _Mapping]] = ...) -> None: ...

class KvSource(_message.Message):
    __slots__ = ("instance_id", "address")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    address: str
    def __init__(self, instance_id: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class SubmitCommand(_message.Message):
    __slots__ = ("handle", "request", "kv", "hand_over")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    KV_FIELD_NUMBER: _ClassVar[int]
    HAND_OVER_FIELD_NUMBER: _ClassVar[int]
    handle: int
    request: AttemptRequest
    kv: KvSource
    hand_over: bool
    def __init__(self, handle: _Optional[int] = ..., request: _Optional[_Union[AttemptRequest, _Mapping]] = ..., kv: _Optional[_Union[KvSource, _Mapping]] = ..., hand_over: _Optional[bool] = ...) -> None: ...

class CancelCommand(_message.Message):
    __slots__ = ("handle",)
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    handle: int
    def __init__(self, handle: _Optional[int] = ...) -> None: ...

class RenewLeaseCommand(_message.Message):
    __slots__ = ("handle",)
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    handle: int
    def __init__(self, handle: _Optional[int] = ...) -> None: ...

class SessionRequest(_message.Message):
    __slots__ = ("submit", "cancel", "renew_lease")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    RENEW_LEASE_FIELD_NUMBER: _ClassVar[int]
    submit: SubmitCommand
    cancel: CancelCommand
    renew_lease: RenewLeaseCommand
    def __init__(self, submit: _Optional[_Union[SubmitCommand, _Mapping]] = ..., cancel: _Optional[_Union[CancelCommand, _Mapping]] = ..., renew_lease: _Optional[_Union[RenewLeaseCommand, _Mapping]] = ...) -> None: ...

class PrefillStartedEvent(_message.Message):
    __slots__ = ("handle", "num_cached_tokens")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    handle: int
    num_cached_tokens: int
    def __init__(self, handle: _Optional[int] = ..., num_cached_tokens: _Optional[int] = ...) -> None: ...

class PrefillFinishedEvent(_message.Message):
    __slots__ = ("handle", "token", "prompt_logprobs", "finish_reason", "num_cached_tokens", "compute_s")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    NUM_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    handle: int
    token: SampledToken
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenLogprob]
    finish_reason: _common_pb2.FinishReason
    num_cached_tokens: int
    compute_s: float
    def __init__(self, handle: _Optional[int] = ..., token: _Optional[_Union[SampledToken, _Mapping]] = ..., prompt_logprobs: _Optional[_Iterable[_Union[_common_pb2.TokenLogprob, _Mapping]]] = ..., finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., num_cached_tokens: _Optional[int] = ..., compute_s: _Optional[float] = ...) -> None: ...

class KvReservedEvent(_message.Message):
    __slots__ = ("handle",)
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    handle: int
    def __init__(self, handle: _Optional[int] = ...) -> None: ...

class TransferCommittedEvent(_message.Message):
    __slots__ = ("handle", "transfer_s", "transfer_bytes", "transport", "streamed_bytes", "streamed_s")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    STREAMED_BYTES_FIELD_NUMBER: _ClassVar[int]
    STREAMED_S_FIELD_NUMBER: _ClassVar[int]
    handle: int
    transfer_s: float
    transfer_bytes: int
    transport: str
    streamed_bytes: int
    streamed_s: float
    def __init__(self, handle: _Optional[int] = ..., transfer_s: _Optional[float] = ..., transfer_bytes: _Optional[int] = ..., transport: _Optional[str] = ..., streamed_bytes: _Optional[int] = ..., streamed_s: _Optional[float] = ...) -> None: ...

class NewTokens(_message.Message):
    __slots__ = ("handle", "token_ids", "logprobs", "finish_reason", "queue_s")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    handle: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenLogprob]
    finish_reason: _common_pb2.FinishReason
    queue_s: float
    def __init__(self, handle: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_common_pb2.TokenLogprob, _Mapping]]] = ..., finish_reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., queue_s: _Optional[float] = ...) -> None: ...

class TokenFrameEvent(_message.Message):
    __slots__ = ("items",)
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[NewTokens]
    def __init__(self, items: _Optional[_Iterable[_Union[NewTokens, _Mapping]]] = ...) -> None: ...

class FailedEvent(_message.Message):
    __slots__ = ("handle", "code", "message")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    handle: int
    code: str
    message: str
    def __init__(self, handle: _Optional[int] = ..., code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("frame", "started", "finished", "reserved", "committed", "failed")
    FRAME_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    frame: TokenFrameEvent
    started: PrefillStartedEvent
    finished: PrefillFinishedEvent
    reserved: KvReservedEvent
    committed: TransferCommittedEvent
    failed: FailedEvent
    def __init__(self, frame: _Optional[_Union[TokenFrameEvent, _Mapping]] = ..., started: _Optional[_Union[PrefillStartedEvent, _Mapping]] = ..., finished: _Optional[_Union[PrefillFinishedEvent, _Mapping]] = ..., reserved: _Optional[_Union[KvReservedEvent, _Mapping]] = ..., committed: _Optional[_Union[TransferCommittedEvent, _Mapping]] = ..., failed: _Optional[_Union[FailedEvent, _Mapping]] = ...) -> None: ...

class ConfigureRequest(_message.Message):
    __slots__ = ("role", "max_batch", "max_batch_tokens", "max_prefill_tokens")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    role: Role
    max_batch: int
    max_batch_tokens: int
    max_prefill_tokens: int
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., max_batch: _Optional[int] = ..., max_batch_tokens: _Optional[int] = ..., max_prefill_tokens: _Optional[int] = ...) -> None: ...

class ConfigureResponse(_message.Message):
    __slots__ = ("instance_id",)
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    def __init__(self, instance_id: _Optional[str] = ...) -> None: ...

class SetRoutersRequest(_message.Message):
    __slots__ = ("control",)
    CONTROL_FIELD_NUMBER: _ClassVar[int]
    control: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, control: _Optional[_Iterable[str]] = ...) -> None: ...

class SetRoutersResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BlockCounts(_message.Message):
    __slots__ = ("total", "free", "running", "cached", "leased", "leaked")
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    LEASED_FIELD_NUMBER: _ClassVar[int]
    LEAKED_FIELD_NUMBER: _ClassVar[int]
    total: int
    free: int
    running: int
    cached: int
    leased: int
    leaked: int
    def __init__(self, total: _Optional[int] = ..., free: _Optional[int] = ..., running: _Optional[int] = ..., cached: _Optional[int] = ..., leased: _Optional[int] = ..., leaked: _Optional[int] = ...) -> None: ...

class LinkStats(_message.Message):
    __slots__ = ("peer_id", "transport", "transfers", "transfer_bytes", "transfer_s", "failures", "streamed_bytes", "wire_bytes", "codec")
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    STREAMED_BYTES_FIELD_NUMBER: _ClassVar[int]
    WIRE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    peer_id: str
    transport: str
    transfers: int
    transfer_bytes: int
    transfer_s: float
    failures: int
    streamed_bytes: int
    wire_bytes: int
    codec: str
    def __init__(self, peer_id: _Optional[str] = ..., transport: _Optional[str] = ..., transfers: _Optional[int] = ..., transfer_bytes: _Optional[int] = ..., transfer_s: _Optional[float] = ..., failures: _Optional[int] = ..., streamed_bytes: _Optional[int] = ..., wire_bytes: _Optional[int] = ..., codec: _Optional[str] = ...) -> None: ...

class InstanceStatus(_message.Message):
    __slots__ = ("instance_id", "role", "state", "address", "model", "fingerprint", "max_model_len", "block_size", "blocks", "waiting_requests", "running_requests", "uncomputed_tokens", "unreserved_tokens", "steps", "step_s", "computed_tokens", "cached_tokens", "preemptions", "links", "lease_s", "step_age_s", "allocated_blocks", "step_prompt_tokens", "step_cost", "weights_hash", "certificate_not_after_s", "unreachable_peers")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    UNCOMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    UNRESERVED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    STEP_AGE_S_FIELD_NUMBER: _ClassVar[int]
    ALLOCATED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STEP_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEP_COST_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_HASH_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_NOT_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    UNREACHABLE_PEERS_FIELD_NUMBER: _ClassVar[int]
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
    steps: int
    step_s: float
    computed_tokens: int
    cached_tokens: int
    preemptions: int
    links: _containers.RepeatedCompositeFieldContainer[LinkStats]
    lease_s: float
    step_age_s: float
    allocated_blocks: int
    step_prompt_tokens: int
    step_cost: _containers.RepeatedScalarFieldContainer[float]
    weights_hash: str
    certificate_not_after_s: float
    unreachable_peers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, instance_id: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., state: _Optional[_Union[InstanceState, str]] = ..., address: _Optional[str] = ..., model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., max_model_len: _Optional[int] = ..., block_size: _Optional[int] = ..., blocks: _Optional[_Union[BlockCounts, _Mapping]] = ..., waiting_requests: _Optional[int] = ..., running_requests: _Optional[int] = ..., uncomputed_tokens: _Optional[int] = ..., unreserved_tokens: _Optional[int] = ..., steps: _Optional[int] = ..., step_s: _Optional[float] = ..., computed_tokens: _Optional[int] = ..., cached_tokens: _Optional[int] = ..., preemptions: _Optional[int] = ..., links: _Optional[_Iterable[_Union[LinkStats, _Mapping]]] = ..., lease_s: _Optional[float] = ..., step_age_s: _Optional[float] = ..., allocated_blocks: _Optional[int] = ..., step_prompt_tokens: _Optional[int] = ..., step_cost: _Optional[_Iterable[float]] = ..., weights_hash: _Optional[str] = ..., certificate_not_after_s: _Optional[float] = ..., unreachable_peers: _Optional[_Iterable[str]] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: InstanceStatus
    def __init__(self, status: _Optional[_Union[InstanceStatus, _Mapping]] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("with_profile",)
    WITH_PROFILE_FIELD_NUMBER: _ClassVar[int]
    with_profile: bool
    def __init__(self, with_profile: _Optional[bool] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("model", "uptime_s", "instances", "running_requests", "queued_requests", "profile", "replan")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    QUEUED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    REPLAN_FIELD_NUMBER: _ClassVar[int]
    model: str
    uptime_s: float
    instances: _containers.RepeatedCompositeFieldContainer[InstanceStatus]
    running_requests: int
    queued_requests: int
    profile: WorkloadProfile
    replan: ReplanStatus
    def __init__(self, model: _Optional[str] = ..., uptime_s: _Optional[float] = ..., instances: _Optional[_Iterable[_Union[InstanceStatus, _Mapping]]] = ..., running_requests: _Optional[int] = ..., queued_requests: _Optional[int] = ..., profile: _Optional[_Union[WorkloadProfile, _Mapping]] = ..., replan: _Optional[_Union[ReplanStatus, _Mapping]] = ...) -> None: ...

class WorkloadProfile(_message.Message):
    __slots__ = ("window", "window_s", "arrivals", "arrival_cv", "finished", "prompt_tokens", "output_tokens", "cached_tokens", "slo_class", "arrival_s")
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    WINDOW_S_FIELD_NUMBER: _ClassVar[int]
    ARRIVALS_FIELD_NUMBER: _ClassVar[int]
    ARRIVAL_CV_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SLO_CLASS_FIELD_NUMBER: _ClassVar[int]
    ARRIVAL_S_FIELD_NUMBER: _ClassVar[int]
    window: int
    window_s: float
    arrivals: int
    arrival_cv: float
    finished: int
    prompt_tokens: _containers.RepeatedScalarFieldContainer[int]
    output_tokens: _containers.RepeatedScalarFieldContainer[int]
    cached_tokens: _containers.RepeatedScalarFieldContainer[int]
    slo_class: _containers.RepeatedScalarFieldContainer[int]
    arrival_s: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, window: _Optional[int] = ..., window_s: _Optional[float] = ..., arrivals: _Optional[int] = ..., arrival_cv: _Optional[float] = ..., finished: _Optional[int] = ..., prompt_tokens: _Optional[_Iterable[int]] = ..., output_tokens: _Optional[_Iterable[int]] = ..., cached_tokens: _Optional[_Iterable[int]] = ..., slo_class: _Optional[_Iterable[int]] = ..., arrival_s: _Optional[_Iterable[float]] = ...) -> None: ...

class ReplanStatus(_message.Message):
    __slots__ = ("state", "changes", "note", "proposal")
    class Change(_message.Message):
        __slots__ = ("name", "planned", "live", "strength")
        NAME_FIELD_NUMBER: _ClassVar[int]
        PLANNED_FIELD_NUMBER: _ClassVar[int]
        LIVE_FIELD_NUMBER: _ClassVar[int]
        STRENGTH_FIELD_NUMBER: _ClassVar[int]
        name: str
        planned: float
        live: float
        strength: float
        def __init__(self, name: _Optional[str] = ..., planned: _Optional[float] = ..., live: _Optional[float] = ..., strength: _Optional[float] = ...) -> None: ...
    class Proposal(_message.Message):
        __slots__ = ("summary", "changes", "gain", "folder")
        SUMMARY_FIELD_NUMBER: _ClassVar[int]
        CHANGES_FIELD_NUMBER: _ClassVar[int]
        GAIN_FIELD_NUMBER: _ClassVar[int]
        FOLDER_FIELD_NUMBER: _ClassVar[int]
        summary: str
        changes: _containers.RepeatedScalarFieldContainer[str]
        gain: float
        folder: str
        def __init__(self, summary: _Optional[str] = ..., changes: _Optional[_Iterable[str]] = ..., gain: _Optional[float] = ..., folder: _Optional[str] = ...) -> None: ...
    STATE_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    PROPOSAL_FIELD_NUMBER: _ClassVar[int]
    state: str
    changes: _containers.RepeatedCompositeFieldContainer[ReplanStatus.Change]
    note: str
    proposal: ReplanStatus.Proposal
    def __init__(self, state: _Optional[str] = ..., changes: _Optional[_Iterable[_Union[ReplanStatus.Change, _Mapping]]] = ..., note: _Optional[str] = ..., proposal: _Optional[_Union[ReplanStatus.Proposal, _Mapping]] = ...) -> None: ...

class ReportReplanRequest(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: ReplanStatus
    def __init__(self, status: _Optional[_Union[ReplanStatus, _Mapping]] = ...) -> None: ...

class ReportReplanResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReportPlanRequest(_message.Message):
    __slots__ = ("plan_json",)
    PLAN_JSON_FIELD_NUMBER: _ClassVar[int]
    plan_json: str
    def __init__(self, plan_json: _Optional[str] = ...) -> None: ...

class ReportPlanResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
