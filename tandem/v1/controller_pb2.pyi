from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ProcessState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PROCESS_STATE_UNSPECIFIED: _ClassVar[ProcessState]
    PROCESS_STATE_LOADING: _ClassVar[ProcessState]
    PROCESS_STATE_UP: _ClassVar[ProcessState]
    PROCESS_STATE_WAITING: _ClassVar[ProcessState]
    PROCESS_STATE_STOPPING: _ClassVar[ProcessState]
    PROCESS_STATE_DRAINED: _ClassVar[ProcessState]
PROCESS_STATE_UNSPECIFIED: ProcessState
PROCESS_STATE_LOADING: ProcessState
PROCESS_STATE_UP: ProcessState
PROCESS_STATE_WAITING: ProcessState
PROCESS_STATE_STOPPING: ProcessState
PROCESS_STATE_DRAINED: ProcessState

class ApplyRequest(_message.Message):
    __slots__ = ("serve_file_json", "grace_s", "plan_json")
    SERVE_FILE_JSON_FIELD_NUMBER: _ClassVar[int]
    GRACE_S_FIELD_NUMBER: _ClassVar[int]
    PLAN_JSON_FIELD_NUMBER: _ClassVar[int]
    serve_file_json: str
    grace_s: float
    plan_json: str
    def __init__(self, serve_file_json: _Optional[str] = ..., grace_s: _Optional[float] = ..., plan_json: _Optional[str] = ...) -> None: ...

class ApplyResponse(_message.Message):
    __slots__ = ("started", "stopped", "replaced")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    REPLACED_FIELD_NUMBER: _ClassVar[int]
    started: _containers.RepeatedScalarFieldContainer[str]
    stopped: _containers.RepeatedScalarFieldContainer[str]
    replaced: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, started: _Optional[_Iterable[str]] = ..., stopped: _Optional[_Iterable[str]] = ..., replaced: _Optional[_Iterable[str]] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ProcessStatus(_message.Message):
    __slots__ = ("name", "role", "state", "pid", "address", "instance_id", "failures", "note")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    name: str
    role: str
    state: ProcessState
    pid: int
    address: str
    instance_id: str
    failures: int
    note: str
    def __init__(self, name: _Optional[str] = ..., role: _Optional[str] = ..., state: _Optional[_Union[ProcessState, str]] = ..., pid: _Optional[int] = ..., address: _Optional[str] = ..., instance_id: _Optional[str] = ..., failures: _Optional[int] = ..., note: _Optional[str] = ...) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("model", "processes", "routers")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROCESSES_FIELD_NUMBER: _ClassVar[int]
    ROUTERS_FIELD_NUMBER: _ClassVar[int]
    model: str
    processes: _containers.RepeatedCompositeFieldContainer[ProcessStatus]
    routers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, model: _Optional[str] = ..., processes: _Optional[_Iterable[_Union[ProcessStatus, _Mapping]]] = ..., routers: _Optional[_Iterable[str]] = ...) -> None: ...

class ScaleRequest(_message.Message):
    __slots__ = ("instances", "grace_s")
    class InstancesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    GRACE_S_FIELD_NUMBER: _ClassVar[int]
    instances: _containers.ScalarMap[str, int]
    grace_s: float
    def __init__(self, instances: _Optional[_Mapping[str, int]] = ..., grace_s: _Optional[float] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("process", "undo", "grace_s")
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    UNDO_FIELD_NUMBER: _ClassVar[int]
    GRACE_S_FIELD_NUMBER: _ClassVar[int]
    process: str
    undo: bool
    grace_s: float
    def __init__(self, process: _Optional[str] = ..., undo: _Optional[bool] = ..., grace_s: _Optional[float] = ...) -> None: ...

class SetRoleRequest(_message.Message):
    __slots__ = ("process", "role")
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    process: str
    role: str
    def __init__(self, process: _Optional[str] = ..., role: _Optional[str] = ...) -> None: ...

class SetRoleResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StopRequest(_message.Message):
    __slots__ = ("grace_s",)
    GRACE_S_FIELD_NUMBER: _ClassVar[int]
    grace_s: float
    def __init__(self, grace_s: _Optional[float] = ...) -> None: ...

class StopResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("num_past",)
    NUM_PAST_FIELD_NUMBER: _ClassVar[int]
    num_past: int
    def __init__(self, num_past: _Optional[int] = ...) -> None: ...

class WatchResponse(_message.Message):
    __slots__ = ("line",)
    LINE_FIELD_NUMBER: _ClassVar[int]
    line: str
    def __init__(self, line: _Optional[str] = ...) -> None: ...

class LogsRequest(_message.Message):
    __slots__ = ("process", "num_past", "follow")
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    NUM_PAST_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    process: str
    num_past: int
    follow: bool
    def __init__(self, process: _Optional[str] = ..., num_past: _Optional[int] = ..., follow: _Optional[bool] = ...) -> None: ...

class LogsResponse(_message.Message):
    __slots__ = ("lines",)
    LINES_FIELD_NUMBER: _ClassVar[int]
    lines: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, lines: _Optional[_Iterable[str]] = ...) -> None: ...

class AnnounceRouterRequest(_message.Message):
    __slots__ = ("control",)
    CONTROL_FIELD_NUMBER: _ClassVar[int]
    control: str
    def __init__(self, control: _Optional[str] = ...) -> None: ...

class AnnounceRouterResponse(_message.Message):
    __slots__ = ("again_s",)
    AGAIN_S_FIELD_NUMBER: _ClassVar[int]
    again_s: float
    def __init__(self, again_s: _Optional[float] = ...) -> None: ...
