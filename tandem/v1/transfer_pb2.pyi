from tandem.v1 import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Transport(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRANSPORT_UNSPECIFIED: _ClassVar[Transport]
    TRANSPORT_SHARED_MEMORY: _ClassVar[Transport]
    TRANSPORT_GLOO: _ClassVar[Transport]
    TRANSPORT_NCCL: _ClassVar[Transport]
TRANSPORT_UNSPECIFIED: Transport
TRANSPORT_SHARED_MEMORY: Transport
TRANSPORT_GLOO: Transport
TRANSPORT_NCCL: Transport

class LinkRequest(_message.Message):
    __slots__ = ("instance_id", "fingerprint", "boot_id", "uid", "transports", "kv_format", "protocol")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    KV_FORMAT_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    fingerprint: str
    boot_id: str
    uid: int
    transports: _containers.RepeatedScalarFieldContainer[Transport]
    kv_format: str
    protocol: int
    def __init__(self, instance_id: _Optional[str] = ..., fingerprint: _Optional[str] = ..., boot_id: _Optional[str] = ..., uid: _Optional[int] = ..., transports: _Optional[_Iterable[_Union[Transport, str]]] = ..., kv_format: _Optional[str] = ..., protocol: _Optional[int] = ...) -> None: ...

class LinkResponse(_message.Message):
    __slots__ = ("link_id", "instance_id", "fingerprint", "transport", "num_blocks", "socket_name", "nonces", "block_size", "tp", "layers_per_stage", "kv_format", "protocol")
    LINK_ID_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SOCKET_NAME_FIELD_NUMBER: _ClassVar[int]
    NONCES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    TP_FIELD_NUMBER: _ClassVar[int]
    LAYERS_PER_STAGE_FIELD_NUMBER: _ClassVar[int]
    KV_FORMAT_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    link_id: str
    instance_id: str
    fingerprint: str
    transport: Transport
    num_blocks: int
    socket_name: str
    nonces: _containers.RepeatedScalarFieldContainer[bytes]
    block_size: int
    tp: int
    layers_per_stage: _containers.RepeatedScalarFieldContainer[int]
    kv_format: str
    protocol: int
    def __init__(self, link_id: _Optional[str] = ..., instance_id: _Optional[str] = ..., fingerprint: _Optional[str] = ..., transport: _Optional[_Union[Transport, str]] = ..., num_blocks: _Optional[int] = ..., socket_name: _Optional[str] = ..., nonces: _Optional[_Iterable[bytes]] = ..., block_size: _Optional[int] = ..., tp: _Optional[int] = ..., layers_per_stage: _Optional[_Iterable[int]] = ..., kv_format: _Optional[str] = ..., protocol: _Optional[int] = ...) -> None: ...

class RendezvousSetRequest(_message.Message):
    __slots__ = ("link_id", "key", "value")
    LINK_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    link_id: str
    key: str
    value: bytes
    def __init__(self, link_id: _Optional[str] = ..., key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...

class RendezvousSetResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RendezvousGetRequest(_message.Message):
    __slots__ = ("link_id", "key")
    LINK_ID_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    link_id: str
    key: str
    def __init__(self, link_id: _Optional[str] = ..., key: _Optional[str] = ...) -> None: ...

class RendezvousGetResponse(_message.Message):
    __slots__ = ("value",)
    VALUE_FIELD_NUMBER: _ClassVar[int]
    value: bytes
    def __init__(self, value: _Optional[bytes] = ...) -> None: ...

class TransferCall(_message.Message):
    __slots__ = ("id", "timeout_s", "pull", "pull_computed", "grant", "acknowledge", "cancel")
    ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    PULL_FIELD_NUMBER: _ClassVar[int]
    PULL_COMPUTED_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    id: int
    timeout_s: float
    pull: PullRequest
    pull_computed: PullComputedRequest
    grant: GrantRequest
    acknowledge: AcknowledgeRequest
    cancel: CancelCall
    def __init__(self, id: _Optional[int] = ..., timeout_s: _Optional[float] = ..., pull: _Optional[_Union[PullRequest, _Mapping]] = ..., pull_computed: _Optional[_Union[PullComputedRequest, _Mapping]] = ..., grant: _Optional[_Union[GrantRequest, _Mapping]] = ..., acknowledge: _Optional[_Union[AcknowledgeRequest, _Mapping]] = ..., cancel: _Optional[_Union[CancelCall, _Mapping]] = ...) -> None: ...

class CancelCall(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TransferAnswer(_message.Message):
    __slots__ = ("id", "pulled", "computed", "granted", "acknowledged", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    PULLED_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_FIELD_NUMBER: _ClassVar[int]
    GRANTED_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: int
    pulled: PullResponse
    computed: PullComputedResponse
    granted: GrantResponse
    acknowledged: AcknowledgeResponse
    error: CallError
    def __init__(self, id: _Optional[int] = ..., pulled: _Optional[_Union[PullResponse, _Mapping]] = ..., computed: _Optional[_Union[PullComputedResponse, _Mapping]] = ..., granted: _Optional[_Union[GrantResponse, _Mapping]] = ..., acknowledged: _Optional[_Union[AcknowledgeResponse, _Mapping]] = ..., error: _Optional[_Union[CallError, _Mapping]] = ...) -> None: ...

class CallError(_message.Message):
    __slots__ = ("code", "message", "param")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PARAM_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    param: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., param: _Optional[str] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("request_id", "epoch")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class PullResponse(_message.Message):
    __slots__ = ("request_id", "epoch", "num_tokens", "token_hash", "block_ids", "fingerprint", "first_token", "block_size", "allocation")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_HASH_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    ALLOCATION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    num_tokens: int
    token_hash: str
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    fingerprint: str
    first_token: _worker_pb2.SampledToken
    block_size: int
    allocation: int
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., num_tokens: _Optional[int] = ..., token_hash: _Optional[str] = ..., block_ids: _Optional[_Iterable[int]] = ..., fingerprint: _Optional[str] = ..., first_token: _Optional[_Union[_worker_pb2.SampledToken, _Mapping]] = ..., block_size: _Optional[int] = ..., allocation: _Optional[int] = ...) -> None: ...

class StageFrontier(_message.Message):
    __slots__ = ("blocks", "next_blocks", "layers", "num_layers")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NEXT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    next_blocks: int
    layers: int
    num_layers: int
    def __init__(self, blocks: _Optional[int] = ..., next_blocks: _Optional[int] = ..., layers: _Optional[int] = ..., num_layers: _Optional[int] = ...) -> None: ...

class KvFrontier(_message.Message):
    __slots__ = ("allocation", "blocks", "next_blocks", "layers", "num_layers", "later")
    ALLOCATION_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NEXT_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    LATER_FIELD_NUMBER: _ClassVar[int]
    allocation: int
    blocks: int
    next_blocks: int
    layers: int
    num_layers: int
    later: _containers.RepeatedCompositeFieldContainer[StageFrontier]
    def __init__(self, allocation: _Optional[int] = ..., blocks: _Optional[int] = ..., next_blocks: _Optional[int] = ..., layers: _Optional[int] = ..., num_layers: _Optional[int] = ..., later: _Optional[_Iterable[_Union[StageFrontier, _Mapping]]] = ...) -> None: ...

class PullComputedRequest(_message.Message):
    __slots__ = ("request_id", "epoch", "known", "min_new", "has_all")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    MIN_NEW_FIELD_NUMBER: _ClassVar[int]
    HAS_ALL_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    known: KvFrontier
    min_new: int
    has_all: bool
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., known: _Optional[_Union[KvFrontier, _Mapping]] = ..., min_new: _Optional[int] = ..., has_all: _Optional[bool] = ...) -> None: ...

class ComputedKv(_message.Message):
    __slots__ = ("request_id", "epoch", "block_ids", "block_size", "frontier")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    FRONTIER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    block_size: int
    frontier: KvFrontier
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., block_size: _Optional[int] = ..., frontier: _Optional[_Union[KvFrontier, _Mapping]] = ...) -> None: ...

class PullComputedResponse(_message.Message):
    __slots__ = ("computed", "finished")
    COMPUTED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    computed: ComputedKv
    finished: PullResponse
    def __init__(self, computed: _Optional[_Union[ComputedKv, _Mapping]] = ..., finished: _Optional[_Union[PullResponse, _Mapping]] = ...) -> None: ...

class GrantRequest(_message.Message):
    __slots__ = ("link_id", "request_id", "epoch", "sequence", "total_bytes", "chunk_bytes", "checksum", "rank", "allocation", "layers_begin", "layers_end", "blocks_begin", "blocks_end", "num_tokens")
    LINK_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALLOCATION_FIELD_NUMBER: _ClassVar[int]
    LAYERS_BEGIN_FIELD_NUMBER: _ClassVar[int]
    LAYERS_END_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_BEGIN_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_END_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    link_id: str
    request_id: str
    epoch: int
    sequence: int
    total_bytes: int
    chunk_bytes: int
    checksum: bool
    rank: int
    allocation: int
    layers_begin: int
    layers_end: int
    blocks_begin: int
    blocks_end: int
    num_tokens: int
    def __init__(self, link_id: _Optional[str] = ..., request_id: _Optional[str] = ..., epoch: _Optional[int] = ..., sequence: _Optional[int] = ..., total_bytes: _Optional[int] = ..., chunk_bytes: _Optional[int] = ..., checksum: _Optional[bool] = ..., rank: _Optional[int] = ..., allocation: _Optional[int] = ..., layers_begin: _Optional[int] = ..., layers_end: _Optional[int] = ..., blocks_begin: _Optional[int] = ..., blocks_end: _Optional[int] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class GrantResponse(_message.Message):
    __slots__ = ("sent_bytes", "checksum")
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    sent_bytes: int
    checksum: int
    def __init__(self, sent_bytes: _Optional[int] = ..., checksum: _Optional[int] = ...) -> None: ...

class AcknowledgeRequest(_message.Message):
    __slots__ = ("request_id", "epoch")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    epoch: int
    def __init__(self, request_id: _Optional[str] = ..., epoch: _Optional[int] = ...) -> None: ...

class AcknowledgeResponse(_message.Message):
    __slots__ = ("owned",)
    OWNED_FIELD_NUMBER: _ClassVar[int]
    owned: bool
    def __init__(self, owned: _Optional[bool] = ...) -> None: ...
