"""The serve file: what to run and how, as frozen values. `core/config_file.py` reads it from YAML."""

import ipaddress
import re
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    WrapSerializer,
    model_validator,
)

from tandem.core.anchored_path import AnchoredPath
from tandem.core.errors import ConfigError
from tandem.core.frozen_model import FrozenModel, WrongSetting
from tandem.core.log_lines import LogFormat
from tandem.core.monitoring_config import KvEventsSection, TracingSection
from tandem.core.parallel import ParallelShape
from tandem.core.secret_source import Secret, SecretReference, read_secret
from tandem.core.slo import SloClasses
from tandem.core.step_coefficients import StepCoefficients
from tandem.core.tls import ClusterTls, PublicTls

_UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


ANY_HOSTS = ("0.0.0.0", "::")
"""Of all interfaces of a machine."""


def parse_bytes(value: object) -> object:
    """512MiB, 2 GB or a plain number of bytes -> int. Anything else is left for pydantic to refuse."""
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)):
        factor = _UNITS.get(match[2].upper())
        if factor is not None:
            return int(float(match[1]) * factor)
    return value


def split_address(address: str) -> tuple[str, int]:
    """host:port -> (host, port). Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or len(port) > 5 or int(port) > 65535:
        raise ConfigError(f"'{address}' is not an address of the form host:port")
    return host.strip("[]"), int(port)


def _check_address(value: object) -> object:
    if isinstance(value, str):
        try:
            split_address(value)
        except ConfigError as error:
            raise ValueError(error.message) from error
    return value


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches host:port."""
    host, _ = split_address(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_any(address: str) -> bool:
    """Whether it is of all interfaces: nobody can be told to connect there."""
    host, _ = split_address(address)
    return host in ANY_HOSTS


def advertised(address: str, host: str | None) -> str:
    """`address` (with its actual port) as others reach it: under the name `host`, if there is one."""
    if host is None:
        return address
    port = split_address(address)[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_exposure(setting: tuple[str, ...], address: str, cluster_token: str | None) -> None:
    """Whoever reaches an internal port reads prompts. Raises WrongSetting for one that others reach without a token."""
    if not cluster_token and not is_loopback(address):
        raise WrongSetting(
            setting,
            f"{address} can be reached from other machines, and there is no cluster_token; set cluster_token to the "
            "same secret in the files of all routers and workers, or listen on 127.0.0.1",
        )


Bytes = Annotated[int, BeforeValidator(parse_bytes, json_schema_input_type=int | str), Field(gt=0)]
Address = Annotated[str, BeforeValidator(_check_address)]
Host = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]+$")]
ModelHash = Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")]
_MODEL_HASH = "Beginning of the hash of the model's files, as a worker's log says it; other files are refused"


_MODEL = "Folder of a checkpoint in Hugging Face format; a relative path starts at this file's folder"
_MODEL_NAME = "Name in the API; default: the folder's name"
_MAX_NAME_CHARS = 256
_TOKEN = "Secret that router and workers share; needed where others reach their ports. Also file:PATH or env:NAME"

_CLUSTER_TLS = "TLS between router, workers and commands; both ends of each connection show a certificate"


class EngineSection(FrozenModel):
    """How an instance computes."""

    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="Of weights and KV; auto: the checkpoint's, if the device is fast with it"
    )
    device: str = Field(
        default="auto", description="cpu, cuda, or one device such as cuda:1; auto: cuda where there is"
    )
    ops: Literal["auto", "torch", "native"] = Field(
        default="auto", description="native: Tandem's CPU kernels; auto: native on a CPU where they can be built"
    )
    threads: int = Field(default=0, ge=0, description="CPU threads per instance; 0 shares the cores between instances")
    kv_memory: Bytes = Field(default=512 << 20, description="KV pool of one instance, e.g. 512MiB")
    block_size: int = Field(default=16, ge=1, le=256, description="Tokens in a block of the KV pool")
    max_model_len: int | None = Field(default=None, ge=1, description="Prompt plus answer; default: the model's")
    tp: int = Field(
        default=1, ge=1, le=64, description="Ranks that divide every layer of an instance (tensor parallel)"
    )
    pp: int = Field(default=1, ge=1, le=64, description="Stages that divide the layers of an instance (pipeline)")

    @property
    def shape(self) -> ParallelShape:
        return ParallelShape(self.tp, self.pp)


class InstanceSection(FrozenModel):
    """Instances of one kind. Bounds that are left out take the default of the role: `scheduling.budget.role_budget`."""

    instances: int = Field(default=1, ge=1, description="How many of them")
    engine: EngineSection = EngineSection()
    max_batch: int = Field(default=64, ge=1, description="Sequences that decode in one step")
    max_batch_tokens: int | None = Field(
        default=None, ge=16, description="Tokens of one step; default: 2048 for prefill, 512 for colocated instances"
    )
    max_prefill_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Prompt tokens of one step, longer prompts go in chunks; default: max_batch_tokens, 512 for decode",
    )
    policy: Literal["chunked", "slack", "prompt_first"] = Field(
        default="chunked", description="How prompts and decoding share the steps of one instance"
    )
    step_cost: StepCoefficients | None = Field(
        default=None,
        description="Expected seconds of a step, per decoding sequence, per token up to 256 and beyond, per token of "
        "KV read, per attention pair; corrected at run time. `tandem serve` takes them from a plan's calibration",
    )
    max_queue: int = Field(default=1024, ge=1, description="Requests waiting in one instance before it refuses more")
    prefix_cache: bool = Field(default=True, description="Keep the KV of prompts for others with the same beginning")
    lease_s: float = Field(default=30.0, gt=0, description="How long computed KV is held for a reader")
    transfer_timeout_s: float = Field(default=10.0, gt=0, description="For KV that comes from another instance")
    transport: Literal["auto", "shared_memory", "gloo", "nccl"] = Field(
        default="auto", description="How KV comes from another instance; auto: the fastest that both have"
    )
    checksum: bool | None = Field(default=None, description="Check the bytes of KV that comes; default: over networks")
    stream_kv_from: Bytes | None = Field(
        default=4 << 20,
        description="KV of a prompt that has so many bytes comes while the prompt is still computed; null: never",
    )
    ray_resources: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={},
        description="Custom resources of Ray that an instance needs with --ray, such as {accelerator_type:H100: 0.01}",
    )
    kv_events: KvEventsSection = KvEventsSection()

    @model_validator(mode="after")
    def _check_kv_events(self) -> "InstanceSection":
        events = self.kv_events
        if self.instances > 1 and events.endpoint and events.bind and "{name}" not in events.endpoint:
            text = f"{events.endpoint} can be the port of one instance only, and there are {self.instances}"
            raise WrongSetting(
                ("kv_events", "endpoint"), f"{text}; connect to a subscriber, or listen on ipc://...{{name}}"
            )
        return self


RoleName = Literal["prefill", "decode", "colocated"]
ROLES: tuple[RoleName, ...] = get_args(RoleName)


def _as_list(value: object) -> object:
    return value if isinstance(value, (list, tuple)) else [value]


def _unwrap(value: tuple[InstanceSection, ...], write: SerializerFunctionWrapHandler) -> object:
    written = write(value)
    return written[0] if len(written) == 1 else written


Kinds = Annotated[
    tuple[InstanceSection, ...],
    BeforeValidator(_as_list, json_schema_input_type=InstanceSection | list[InstanceSection]),
    WrapSerializer(_unwrap),
]
"""Instances of one role: one section, or a list of sections where there are several kinds."""


class RouterSection(FrozenModel):
    http: Address = Field(default="127.0.0.1:8000", description="OpenAI's API, health, /metrics, /ui; port 0: any free")
    grpc: Address = Field(default="127.0.0.1:8001", description="tandem.v1.InferenceService, for tandem.Client")
    control: Address = Field(default="127.0.0.1:8002", description="Where workers report; never for clients")
    request_timeout_s: float = Field(default=600.0, gt=0, description="Deadline of a request that names none")
    max_queue: int = Field(default=1024, ge=1, description="Requests in the router before it refuses more")
    outstanding_steps: float = Field(
        default=2.0,
        gt=0,
        description="Steps of an instance whose prompt tokens may wait there to be computed, before requests wait here",
    )
    max_outstanding_tokens: int | None = Field(
        default=16384,
        ge=1,
        description="Prompt tokens that may wait in an instance, to be computed or decoded, before requests wait here",
    )
    max_wait_s: float = Field(
        default=30.0, gt=0, description="A request that would wait here for longer is refused with 429"
    )
    policy: Literal["balanced", "goodput"] = Field(
        default="balanced",
        description="Instances by the least work, or by expected goodput; goodput needs step_cost of all instances",
    )
    queue_order: Literal["fcfs", "edf", "goodput"] = Field(
        default="goodput",
        description="Order of requests that wait here: as they came, by TTFT target, or as many as possible in time",
    )
    slo: SloClasses = Field(default=(), description="Classes of requests, which name one with the header x-tandem-slo")
    tls: PublicTls | None = Field(default=None, description="TLS of the ports http and grpc")
    api_keys: SecretReference | None = Field(
        default=None, description="Keys of clients, file:PATH or env:NAME (`tandem key` makes them); null: none needed"
    )
    allow_anonymous: bool = Field(
        default=False,
        description="Serve without API keys though others reach http or grpc, because something else guards them",
    )
    open_metrics: bool = Field(default=False, description="/metrics needs no API key")
    share_prefixes: bool = Field(
        default=False,
        description="With API keys: tenants share cached prefixes. Faster, but times then tell what others have sent",
    )
    max_body: Bytes = Field(default=8 << 20, description="Of an HTTP request, and of a gRPC message to the router")
    max_bodies: Bytes = Field(default=256 << 20, description="HTTP bodies that all running requests together hold")
    max_body_items: int = Field(default=1 << 18, ge=1024, description="Items of lists and objects in one HTTP body")
    max_header: Bytes = Field(default=32 << 10, description="Request line and headers of one HTTP request")
    max_connections: int = Field(default=4096, ge=1, description="HTTP connections at once")
    max_client_connections: int = Field(default=1024, ge=1, description="HTTP connections of one client address")
    max_client_choices: int = Field(
        default=512, ge=1, description="Choices of one client (API key, or without keys address) at once"
    )
    max_response_logprobs: int = Field(default=1 << 19, ge=1, description="Log-probabilities in one response")
    header_timeout_s: float = Field(default=10.0, gt=0, description="For the headers of an HTTP request to arrive")
    body_timeout_s: float = Field(default=60.0, gt=0, description="For the body of an HTTP request to arrive")
    idle_timeout_s: float = Field(default=75.0, gt=0, description="Between two requests of an HTTP connection")
    write_timeout_s: float = Field(default=30.0, gt=0, description="For a client that does not read its response")
    cors_origins: tuple[str, ...] = Field(
        default=(), description='Web pages that may use the HTTP API, such as https://chat.example.com, or "*"'
    )
    allowed_hosts: tuple[str, ...] = Field(
        default=(), description="Names in the Host header besides localhost, when HTTP listens on this machine only"
    )
    reflection: bool = Field(default=True, description="gRPC clients such as grpcurl may list the services")
    generation_config: Literal["auto", "none"] = Field(
        default="auto",
        description="What requests get that name no temperature, top_p, top_k, min_p, repetition_penalty or limit of "
        "tokens: what the checkpoint's generation_config.json says (auto), or OpenAI's defaults (none)",
    )
    parse_control_tokens: bool = Field(
        default=False, description="Names of control tokens in prompts and messages count as these tokens, not as text"
    )
    resume: bool = Field(default=True, description="Continue on another instance when one is lost mid-stream")
    replacement_wait_s: float = Field(
        default=30.0, ge=0, description="How long a request that lost its instances waits for others"
    )
    profile_window_s: float = Field(
        default=300.0, gt=0, description="Requests of this long are compared with those that were planned for"
    )
    tracing: TracingSection = TracingSection()
    vllm_metrics: bool = Field(
        default=False, description="/metrics also has the four metrics of vLLM by which other gateways choose"
    )
    ui: bool = Field(default=True, description="Serve the page /ui, which shows the cluster, on the HTTP port")
    plan: AnchoredPath | None = Field(
        default=None, description="A plan that /ui shows beside what is measured; null: the one of the controller"
    )

    @model_validator(mode="after")
    def _check_clients(self) -> "RouterSection":
        """Who reaches a public port uses the machines behind it."""
        knows_clients = self.api_keys is not None or (self.tls is not None and self.tls.client_ca is not None)
        for setting in ("http", "grpc"):
            address = getattr(self, setting)
            if not (knows_clients or self.allow_anonymous or is_loopback(address)):
                raise WrongSetting(
                    (setting,),
                    f"{address} can be reached from other machines, and everybody there would be served; set api_keys "
                    "(`tandem key` makes them) or tls.client_ca, or allow_anonymous: true if something else guards it",
                )
        return self

    @model_validator(mode="after")
    def _check_bodies(self) -> "RouterSection":
        if self.max_bodies < self.max_body:
            text = f"is {self.max_bodies}, less than max_body, {self.max_body}"
            raise WrongSetting(("max_bodies",), text)
        return self


class ServeConfig(FrozenModel):
    """A whole deployment on one model."""

    model: AnchoredPath = Field(description=_MODEL)
    model_name: str | None = Field(default=None, min_length=1, max_length=_MAX_NAME_CHARS, description=_MODEL_NAME)
    router: RouterSection = RouterSection()
    prefill: Kinds = Field(default=(), description="Instances that compute prompts for others")
    decode: Kinds = Field(default=(), description="Instances that decode what others have prefilled")
    colocated: Kinds = Field(default=(), description="Instances that do both")
    cluster_token: Secret | None = Field(
        default=None,
        repr=False,
        description="Shared secret of router and workers, or file:PATH, env:NAME; serve makes one",
    )
    cluster_tls: ClusterTls | None = Field(default=None, description=_CLUSTER_TLS)
    model_hash: ModelHash | None = Field(default=None, description=_MODEL_HASH)
    start_router: bool = Field(
        default=True, description="false: routers are started elsewhere, and name the controller of this cluster"
    )
    controller: Address = Field(
        default="127.0.0.1:0", description="Where the controller listens for `tandem` commands; port 0: any free one"
    )
    load_timeout_s: float = Field(
        default=900.0, gt=0, description="How long a process may take to start before `tandem serve` starts it again"
    )
    log_format: LogFormat = Field(default="text", description="Of log lines: text, or one JSON object a line")

    @model_validator(mode="before")
    @classmethod
    def _default_roles(cls, data: Any) -> Any:
        """Prefill and decode go together; a file that names no instances gets one of each."""
        if isinstance(data, dict) and ("colocated" not in data or "prefill" in data or "decode" in data):
            return {"prefill": {}, "decode": {}} | data
        return data

    @model_validator(mode="after")
    def _check_pairs(self) -> "ServeConfig":
        """KV moves only between instances with the same dtype; their blocks and ranks may differ."""
        mistakes = []
        for role, section, others in (
            *(("prefill", section, self.decode) for section in self.prefill),
            *(("decode", section, self.prefill) for section in self.decode),
        ):
            value, found = section.engine.dtype, {other.engine.dtype for other in others}
            if value not in found:
                text = (
                    f"is {value}, and {'decode' if role == 'prefill' else 'prefill'} has {' and '.join(sorted(found))}"
                )
                mistakes.append(("dtype" in section.engine.model_fields_set, role, section, text))
        if mistakes:  # the setting that is in the file is the one to name
            _, role, section, text = max(mistakes, key=lambda mistake: mistake[0])
            sections = getattr(self, role)
            index = () if len(sections) == 1 else (sections.index(section),)
            raise WrongSetting((role, *index, "engine", "dtype"), f"{text}; KV moves only between equal ones")
        return self

    @property
    def kinds(self) -> tuple[tuple[RoleName, InstanceSection], ...]:
        """All kinds of instances with their roles, prefill first."""
        return tuple((role, section) for role in ROLES for section in getattr(self, role))

    @property
    def served_name(self) -> str:
        return self.model_name or self.model.resolve().name


class WorkerConfig(FrozenModel):
    """One instance."""

    model: AnchoredPath = Field(description=_MODEL)
    model_name: str | None = Field(default=None, min_length=1, max_length=_MAX_NAME_CHARS, description=_MODEL_NAME)
    role: RoleName = Field(default="colocated", description="`python -m prefill_worker` and the like set it")
    listen: Address = Field(default="127.0.0.1:0", description="For routers and other instances; port 0: any free")
    advertise: Host | None = Field(
        default=None, description="Host under which routers and other instances reach this one; default: that of listen"
    )
    routers: tuple[Address, ...] = Field(
        default=("127.0.0.1:8002",),
        description="Control addresses to report to; a name in DNS may stand for several routers",
    )
    name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        description="Beginning of the instance's id, in logs, metrics and `tandem status`; default: the role",
    )
    heartbeat_s: float = Field(default=0.25, gt=0, description="Time between two reports to a router")
    plan_epoch: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9._-]{1,64}$",
        description="KV moves only between instances with the same one: during a rolling update, old and new instances "
        "form no pairs",
    )
    model_hash: ModelHash | None = Field(default=None, description=_MODEL_HASH)
    cluster_token: Secret | None = Field(default=None, repr=False, description=_TOKEN)
    cluster_tls: ClusterTls | None = Field(default=None, description=_CLUSTER_TLS)
    log_format: LogFormat = Field(default="text", description="Of log lines: text, or one JSON object a line")
    instance: InstanceSection = Field(default=InstanceSection(), description="`instances` counts as 1")

    @model_validator(mode="after")
    def _check_listen(self) -> "WorkerConfig":
        _check_exposure(("listen",), self.listen, self.cluster_token)
        if _is_any(self.listen) and self.advertise is None:
            raise WrongSetting(
                ("advertise",), f"is missing: others cannot connect to {self.listen}; set it to this host"
            )
        return self

    @property
    def served_name(self) -> str:
        return self.model_name or self.model.resolve().name


class RouterConfig(FrozenModel):
    """One router process. It loads the tokenizer and chat template of `model`, never its weights."""

    model: AnchoredPath = Field(description=_MODEL)
    model_name: str | None = Field(default=None, min_length=1, max_length=_MAX_NAME_CHARS, description=_MODEL_NAME)
    router: RouterSection = RouterSection()
    heartbeat_timeout_s: float = Field(default=1.5, gt=0, description="Silence after which a worker counts as gone")
    controller: Address | None = Field(
        default=None, description="A controller whose instances shall report to this router, too"
    )
    advertise: Host | None = Field(
        default=None, description="Host under which instances reach the control port; default: that of router.control"
    )
    cluster_token: Secret | None = Field(default=None, repr=False, description=_TOKEN)
    cluster_tls: ClusterTls | None = Field(default=None, description=_CLUSTER_TLS)
    log_format: LogFormat = Field(default="text", description="Of log lines: text, or one JSON object a line")

    @model_validator(mode="after")
    def _check_control(self) -> "RouterConfig":
        _check_exposure(("router", "control"), self.router.control, self.cluster_token)
        if self.controller is not None and _is_any(self.router.control) and self.advertise is None:
            text = f"is missing: instances cannot connect to {self.router.control}; set it to this host"
            raise WrongSetting(("advertise",), text)
        return self

    @property
    def served_name(self) -> str:
        return self.model_name or self.model.resolve().name


Config = TypeVar("Config", ServeConfig, WorkerConfig, RouterConfig)


def with_secrets(config: Config) -> Config:
    """The configuration with its cluster token itself in the place of a reference. Raises ConfigError."""
    if config.cluster_token is None:
        return config
    return config.model_copy(update={"cluster_token": read_secret(config.cluster_token)})
