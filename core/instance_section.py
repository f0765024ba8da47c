"""Settings of the instances of one kind: how they compute, batch, and fetch KV."""

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, SerializerFunctionWrapHandler, WrapSerializer, model_validator

from tandem.core.byte_size import Bytes
from tandem.core.frozen_model import FrozenModel, WrongSetting
from tandem.core.kv_codec import KvCodecName
from tandem.core.monitoring_config import KvEventsSection
from tandem.core.parallel import ParallelShape
from tandem.core.sampling_ranges import INT32_MAX
from tandem.core.step_coefficients import StepCoefficients

MAX_THREADS = 1024
MAX_PARALLEL = 64
"""Upper bound of tp and of pp."""
MAX_INSTANCES = 10_000
"""Upper bound for one kind. A router is made for far fewer; a larger number is a mistake that would fill the memory."""


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
    threads: int = Field(
        default=0, ge=0, le=MAX_THREADS, description="CPU threads per instance; 0 shares the cores between instances"
    )
    kv_memory: Bytes = Field(default=512 << 20, description="KV pool of one instance, e.g. 512MiB")
    block_size: int = Field(default=16, ge=1, le=256, description="Tokens in a block of the KV pool")
    max_model_len: int | None = Field(
        default=None, ge=1, le=INT32_MAX, description="Prompt plus answer; default: the model's"
    )
    tp: int = Field(
        default=1, ge=1, le=MAX_PARALLEL, description="Ranks that divide every layer of an instance (tensor parallel)"
    )
    pp: int = Field(
        default=1, ge=1, le=MAX_PARALLEL, description="Stages that divide the layers of an instance (pipeline)"
    )

    @property
    def shape(self) -> ParallelShape:
        return ParallelShape(self.tp, self.pp)


class InstanceSection(FrozenModel):
    """Instances of one kind. Bounds that are left out take the default of the role: `scheduling.budget.role_budget`."""

    instances: int = Field(default=1, ge=1, le=MAX_INSTANCES, description="How many of them")
    engine: EngineSection = EngineSection()
    max_batch: int = Field(
        default=64,
        ge=1,
        le=INT32_MAX,
        description="Sequences that decode in one step. Of several pipeline stages, each computes a step at a time; "
        "these steps share this bound, and those of tokens",
    )
    max_batch_tokens: int | None = Field(
        default=None,
        ge=16,
        le=INT32_MAX,
        description="Tokens of one step; default: 2048 for prefill, 512 for colocated instances",
    )
    max_prefill_tokens: int | None = Field(
        default=None,
        ge=1,
        le=INT32_MAX,
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
    max_queue: int = Field(
        default=1024, ge=1, le=INT32_MAX, description="Requests waiting in one instance before it refuses more"
    )
    prefix_cache: bool = Field(default=True, description="Keep the KV of prompts for others with the same beginning")
    lease_s: float = Field(default=30.0, gt=0, description="How long computed KV is held for a reader")
    transfer_timeout_s: float = Field(default=10.0, gt=0, description="For KV that comes from another instance")
    transport: Literal["auto", "shared_memory", "gloo", "nccl"] = Field(
        default="auto", description="How KV comes from another instance; auto: the fastest that both have"
    )
    kv_codec: KvCodecName = Field(
        default="none",
        description="How KV from another instance is coded on its way over a network: fp8, int8 and int4 send fewer "
        "bytes and round. KV in shared memory is copied as it is",
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
    pod_group: str | None = Field(
        default=None,
        description="With a controller on Kubernetes: the chart's group of workers whose pods these instances have; "
        "null: the one with the name of the role",
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
