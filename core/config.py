"""The files of a whole deployment, of a worker and of a router, as frozen values.

`core/config_file.py` reads them from YAML.
"""

from typing import Annotated, Any, TypeVar

from pydantic import Field, model_validator

from tandem.core.address import Address, Host, is_any_host, is_loopback, split_address
from tandem.core.anchored_path import AnchoredPath
from tandem.core.errors import ConfigError
from tandem.core.frozen_model import FrozenModel, WrongSetting
from tandem.core.instance_section import ROLES, InstanceSection, Kinds, RoleName
from tandem.core.log_lines import LogFormat
from tandem.core.printable import is_header_text
from tandem.core.router_section import RouterSection
from tandem.core.secret_source import Secret, read_secret
from tandem.core.tls import ClusterTls

ModelHash = Annotated[str, Field(pattern=r"^[0-9a-f]{8,64}$")]
_MODEL_HASH = "Beginning of the hash of the model's files, as a worker's log says it; other files are refused"
_MODEL = "Folder of a checkpoint in Hugging Face format; a relative path starts at this file's folder"
_MODEL_NAME = "Name in the API; default: the folder's name"
_MAX_NAME_CHARS = 256
_TOKEN = "Secret that router and workers share; needed where others reach their ports. Also file:PATH or env:NAME"

_CLUSTER_TLS = "TLS between router, workers and commands; both ends of each connection show a certificate"


def _check_exposure(setting: tuple[str, ...], address: str, cluster_token: str | None) -> None:
    """Raises WrongSetting for an internal port that other machines reach without a token: they could read prompts."""
    if not cluster_token and not is_loopback(address):
        raise WrongSetting(
            setting,
            f"{address} can be reached from other machines, and there is no cluster_token; set cluster_token to the "
            "same secret in the files of all routers and workers, or listen on 127.0.0.1",
        )


class _ModelConfig(FrozenModel):
    """The model that a process or a deployment serves."""

    model: AnchoredPath = Field(description=_MODEL)
    model_name: str | None = Field(default=None, min_length=1, max_length=_MAX_NAME_CHARS, description=_MODEL_NAME)

    @property
    def served_name(self) -> str:
        """The model's name in the API."""
        return self.model_name or self.model.resolve().name


class ServeConfig(_ModelConfig):
    """A whole deployment on one model."""

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
        """Prefill and decode need each other, and KV moves only between instances with the same dtype; their blocks and
        ranks may differ."""
        for missing, other in (("prefill", "decode"), ("decode", "prefill")):
            if getattr(self, other) and not getattr(self, missing):
                text = f"is empty, and {other} has instances, which need it; add an instance, or empty both"
                raise WrongSetting((missing,), text)
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


class RanksSection(FrozenModel):
    """An instance whose ranks are on several hosts. `tandem worker` starts rank 0 and the ranks of its host, and
    `tandem ranks`, with the same settings, those of one more host."""

    listen: Address = Field(description="Where rank 0 waits for the other hosts: an address of its host, and a port")
    per_host: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=2)] = Field(
        description="Ranks on each host, that of rank 0 first; together tp times pp"
    )


class WorkerConfig(_ModelConfig):
    """One instance."""

    role: RoleName = Field(default="colocated", description="What the routers send to it")
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
    ranks: RanksSection | None = Field(default=None, description="Hosts of the ranks; null: all are on one host")

    @model_validator(mode="after")
    def _check_ranks(self) -> "WorkerConfig":
        if self.ranks is None:
            return self
        address, shape = self.ranks.listen, self.instance.engine.shape
        if is_any_host(address) or split_address(address)[1] == 0:
            text = f"is {address}; other hosts connect to it, so name an address of rank 0's host, and a port"
            raise WrongSetting(("ranks", "listen"), text)
        _check_exposure(("ranks", "listen"), address, self.cluster_token)
        if sum(self.ranks.per_host) != shape.num_ranks:
            text = f"has {sum(self.ranks.per_host)} ranks, and an instance of {shape} has {shape.num_ranks}"
            raise WrongSetting(("ranks", "per_host"), text)
        if self.instance.transport == "shared_memory":
            text = "is shared_memory, and ranks on other hosts cannot be reached by it; leave it out"
            raise WrongSetting(("instance", "transport"), text)
        return self

    @model_validator(mode="after")
    def _check_listen(self) -> "WorkerConfig":
        _check_exposure(("listen",), self.listen, self.cluster_token)
        if is_any_host(self.listen) and self.advertise is None:
            raise WrongSetting(
                ("advertise",), f"is missing: others cannot connect to {self.listen}; set it to this host"
            )
        return self


class RouterConfig(_ModelConfig):
    """One router process. It loads the tokenizer and chat template of `model`, never its weights."""

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
        if self.controller is not None and is_any_host(self.router.control) and self.advertise is None:
            text = f"is missing: instances cannot connect to {self.router.control}; set it to this host"
            raise WrongSetting(("advertise",), text)
        return self


Config = TypeVar("Config", ServeConfig, WorkerConfig, RouterConfig)


def with_secrets(config: Config) -> Config:
    """The configuration with its cluster token itself in the place of a reference. Raises ConfigError, also for a token
    that no call could carry."""
    if config.cluster_token is None:
        return config
    token = read_secret(config.cluster_token)
    if not is_header_text(token):
        raise ConfigError(
            "the cluster_token can have printable characters of ASCII only, and no space at its ends: it is sent in a "
            "header"
        )
    return config.model_copy(update={"cluster_token": token})
