"""The plan: the instances to run, their shapes and devices, and their predicted behaviour.

`tandem plan` writes a plan, a user may edit it, `tandem serve` and `tandem simulate` read it.
`core.config_file.load_config(path, Plan)` reads a plan file and names every mistake.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from tandem.core.anchored_path import AnchoredPath, ModelName
from tandem.core.frozen_model import FrozenModel, WrongSetting
from tandem.core.instance_section import MAX_INSTANCES, MAX_PARALLEL
from tandem.core.kv_codec import KvCodecName
from tandem.core.parallel import ParallelShape
from tandem.core.precision import AS_STORED, Precision
from tandem.core.sampling_ranges import INT32_MAX
from tandem.core.slo import SloClass, SloClasses

PLAN_VERSION: Literal[1] = 1


def _check_version(value: object) -> object:
    if value != PLAN_VERSION:
        raise ValueError(
            f"this tandem reads plans of version {PLAN_VERSION}, not {value!r}; make a new plan with `tandem plan`"
        )
    return value


def node_of(device: str) -> str:
    """Of a device's name, node:index."""
    return device.rpartition(":")[0]


def ranks_on_nodes(devices: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Each node of one instance's devices, in the order of its ranks, with the number of ranks there."""
    return tuple((node, len(list(ranks))) for node, ranks in groupby(devices, node_of))


class PlanGroup(FrozenModel):
    """Equal instances. `devices` names the devices of each instance as node:index, e.g. ['0:0', '0:1'], in the order of
    its ranks; those of one node follow each other. With an empty list Ray picks the devices. A colocated group serves
    both phases on the same devices."""

    role: Literal["prefill", "decode", "colocated"]
    instances: int = Field(ge=1, le=MAX_INSTANCES)
    device: str = Field(description="Device type, as in the cluster's nodes")
    tp: int = Field(default=1, ge=1, le=MAX_PARALLEL)
    pp: int = Field(default=1, ge=1, le=MAX_PARALLEL)
    dp: int = Field(default=1, ge=1, description="Ranks that share experts, each with sequences of its own; tp, pp: 1")
    devices: tuple[tuple[str, ...], ...] = Field(default=(), description="Devices of each instance, node:index")
    max_batch_tokens: int = Field(default=2048, ge=16, le=INT32_MAX, description="Prompt tokens in one step")
    max_batch: int = Field(default=64, ge=1, le=INT32_MAX, description="Sequences decoded together in one step")
    kv_tokens: int = Field(ge=1, le=1 << 36, description="Tokens whose KV fits one instance")
    max_prefill_tokens: int | None = Field(
        default=None,
        ge=1,
        le=INT32_MAX,
        description="Prompt tokens of one step beside decoding; default: that of the role",
    )
    policy: Literal["chunked", "slack", "prompt_first"] = Field(
        default="chunked",
        description="How a group mixes prompts and decoding; slack: prompts take only the time that decoding has saved",
    )

    @property
    def shape(self) -> ParallelShape:
        return ParallelShape(self.tp, self.pp, self.dp)

    @property
    def num_devices(self) -> int:
        return self.instances * self.shape.num_ranks

    @model_validator(mode="after")
    def _check_devices(self) -> "PlanGroup":
        if self.devices and len(self.devices) != self.instances:
            raise WrongSetting(("devices",), f"lists {len(self.devices)} instances, but there are {self.instances}")
        if self.dp > 1 and (self.tp, self.pp) != (1, 1):
            raise WrongSetting(("dp",), f"{self.dp} is for tp 1 and pp 1, not tp {self.tp} and pp {self.pp}")
        if any(len(ranks) != self.shape.num_ranks for ranks in self.devices):
            by = f"dp {self.dp}" if self.dp > 1 else f"tp {self.tp} x pp {self.pp}"
            raise WrongSetting(("devices",), f"each instance needs {self.shape.num_ranks} devices ({by})")
        for ranks in self.devices:
            nodes = [node for node, _ in ranks_on_nodes(ranks)]
            if len(set(nodes)) < len(nodes):
                listed = ", ".join(ranks)
                raise WrongSetting(("devices",), f"mixes the nodes of an instance ({listed}); list node after node")
        return self


class _Prediction(FrozenModel):
    """A figure is NaN where nothing was simulated that has it, such as the time per token of answers of one token."""

    model_config = ConfigDict(allow_inf_nan=True)


class Quantiles(_Prediction):
    """Seconds."""

    mean: float
    p50: float
    p90: float
    p99: float


class ExpectedClass(_Prediction):
    """One SLO class as simulated at the plan's rate. `attainment_ci` is a 95 % interval."""

    slo: SloClass
    attainment: float
    attainment_ci: tuple[float, float]
    ttft_s: Quantiles
    tpot_s: Quantiles


class ExpectedWindow(_Prediction):
    """One window of a trace, [`begin_s`, `end_s`) since its first request, at the plan's rate. `attainment` is that of
    the class with the smallest margin. Rates and lengths are those of the trace."""

    begin_s: float
    end_s: float
    time_share: float = Field(description="Part of the trace's time that the window stands for")
    rate: float = Field(description="Requests per second in the trace")
    prompt_tokens: float = Field(description="Mean")
    output_tokens: float = Field(description="Mean")
    repeated_share: float = Field(description="Share of prompt tokens that repeat an earlier request")
    attainment: float
    attainment_ci: tuple[float, float]
    meets: bool


class Expected(_Prediction):
    """Predicted behaviour in steady state. Goodput is the highest rate at which every class keeps its attainment."""

    rate: float = Field(description="Requests per second at which the plan was evaluated")
    requests: int | None = Field(default=None, description="Number of requests with which the plan was evaluated")
    goodput: float = Field(description="Requests per second of the whole plan")
    goodput_ci: tuple[float, float]
    goodput_per_device: float
    cost_per_hour: float | None = Field(default=None, description="USD; none if a device has no known price")
    classes: tuple[ExpectedClass, ...]
    cached_share: float | None = Field(
        default=None, description="Share of the prompt tokens found in a prefix cache; none if no prefix is shared"
    )
    windows: tuple[ExpectedWindow, ...] = Field(
        default=(), description="Of a trace; `classes` has the results of the window that decides"
    )
    bounds: dict[str, str] = Field(default={}, description="Role -> the cost term that bounds its steps")


class Alternative(_Prediction):
    """A deployment that the planner rejected."""

    description: str
    num_devices: int
    goodput_per_device: float | None = Field(default=None, description="None: rejected without a simulation")
    reason: str


class Plan(FrozenModel):
    """`model` is a checkpoint's folder or the name of a published shape; only a folder can be served. The groups of an
    infeasible plan meet the nearest feasible targets; there are none if the model does not fit the cluster."""

    version: Annotated[Literal[1], BeforeValidator(_check_version)] = PLAN_VERSION
    model: ModelName
    precision: Precision = Field(default=AS_STORED, description="Of weights and KV, for which the plan was made")
    verdict: Literal["disaggregate", "colocate", "mixed", "infeasible"]
    summary: str = Field(default="", description="The plan in one or two sentences")
    groups: tuple[PlanGroup, ...]
    slo: SloClasses = Field(default=(), description="Classes of requests that `tandem serve` knows, with their targets")
    same_node: bool = Field(default=False, description="KV moves only between instances of one node (low affinity)")
    kv_codec: KvCodecName = Field(
        default="none", description="How KV is coded on its way over a network, as the setting of instances says"
    )
    slo_file: AnchoredPath | None = Field(
        default=None, description="The SLO file of this plan: workload, cluster, targets"
    )
    expected: Expected | None = None
    alternatives: tuple[Alternative, ...] = ()
    notes: tuple[str, ...] = Field(default=(), description="What the planner found out about shapes on this cluster")

    @property
    def num_devices(self) -> int:
        return sum(group.num_devices for group in self.groups)

    @model_validator(mode="after")
    def _check_groups(self) -> "Plan":
        roles = {group.role for group in self.groups}
        if not roles and self.verdict != "infeasible":
            raise WrongSetting(("groups",), "must have at least one group of instances")
        if ("prefill" in roles) != ("decode" in roles):
            missing = "decode" if "prefill" in roles else "prefill"
            raise WrongSetting(("groups",), f"there is no {missing} group; prefill and decode groups need each other")
        used = [device for group in self.groups for ranks in group.devices for device in ranks]
        twice = next((device for device in used if used.count(device) > 1), None)
        if twice is not None:
            raise WrongSetting(("groups",), f"device {twice} is given to two ranks")
        return self
