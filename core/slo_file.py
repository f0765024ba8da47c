"""The SLO file: the planner's input, with model, cluster, SLO classes, workload and objective.

`core.config_file.load_config(path, SloFile)` reads it. The planner's output is a `core.plan.Plan`.
"""

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from tandem.core.anchored_path import AnchoredPath, ModelName
from tandem.core.config import Bytes
from tandem.core.frozen_model import FrozenModel, WrongSetting
from tandem.core.slo import SloClasses


class NodeSection(FrozenModel):
    """`count` equal machines, each with `devices` devices of type `device`."""

    device: str = Field(description="A device of the catalogue (see `tandem plan --devices`), or cpu")
    devices: int = Field(default=8, ge=1, description="Devices in one node")
    count: int = Field(default=1, ge=1, description="How many such nodes")
    calibration: AnchoredPath | None = Field(
        default=None, description="File that `tandem profile` wrote for this device and model"
    )
    price_per_device_hour: float | None = Field(default=None, gt=0, description="USD; default: the catalogue's price")
    nvlink_gbytes_per_s: float | None = Field(
        default=None, gt=0, description="Between devices of a node, one direction; default: the catalogue's"
    )
    nic_gbits_per_s: float | None = Field(
        default=None, gt=0, description="Per device, between nodes; default: the catalogue's"
    )


class ClusterSection(FrozenModel):
    nodes: tuple[NodeSection, ...] = Field(min_length=1)
    memory_share: float = Field(default=0.9, gt=0, le=1, description="Share of device memory for weights and KV")
    kv_memory: Bytes | None = Field(default=None, description="KV pool of one rank; default: what weights leave free")


class LengthSection(FrozenModel):
    """A log-normal distribution of this mean and coefficient of variation, truncated to [min, max]; cv 0 is a fixed
    length."""

    mean: float = Field(gt=0, description="Tokens")
    cv: float = Field(default=1.0, ge=0, description="Standard deviation divided by the mean")
    min: int = Field(default=1, ge=1, description="Tokens")
    max: int = Field(default=1 << 20, ge=1, description="Tokens")

    @model_validator(mode="after")
    def _check_order(self) -> "LengthSection":
        if not self.min <= self.mean <= self.max:
            raise WrongSetting(("mean",), f"{self.mean:g} is not between min {self.min} and max {self.max}")
        return self


class PrefixSection(FrozenModel):
    """`share` of the requests begin with one of `groups` common prefixes of `tokens` tokens, e.g. system prompts."""

    share: float = Field(ge=0, le=1, description="Of the requests that begin with a common prefix")
    groups: int = Field(default=1, ge=1, description="Different prefixes")
    tokens: int = Field(ge=1, description="Length of each prefix")


class ArrivalSection(FrozenModel):
    process: Literal["poisson", "gamma"] = Field(default="poisson", description="Times between arrivals")
    cv: float = Field(default=1.0, gt=0, description="Variation coefficient of times between arrivals; gamma only")


def _check_rate(value: object) -> object:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value != "max" and not (is_number and 0 < float(value) < math.inf):  # type: ignore[arg-type]
        raise ValueError(f"{value!r} is neither a number of requests per second above 0 nor max")
    return value


Rate = Annotated[float | Literal["max"], BeforeValidator(_check_rate)]


class WorkloadSection(FrozenModel):
    """Lengths come from `trace`, from `dataset`, or from `prompt_tokens` and `output_tokens`. A trace also has
    arrivals."""

    trace: AnchoredPath | None = Field(default=None, description="CSV or JSON lines, .gz or not: arrivals and lengths")
    dataset: str | None = Field(default=None, description="Lengths of a built-in data set, e.g. sharegpt")
    prompt_tokens: LengthSection | None = None
    output_tokens: LengthSection | None = None
    max_total_tokens: int | None = Field(default=None, ge=2, description="Longer requests are left out")
    cover: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Share of the time of a trace in whose windows the targets must be met; 1: in the worst one, too",
    )
    length_scale: float = Field(default=1.0, gt=0, description="Multiplies all lengths, to fit a smaller model")
    arrivals: ArrivalSection = ArrivalSection()
    rate: Rate = Field(default="max", description="Requests per second, or max: the highest rate within the SLO")
    prefix: PrefixSection | None = None

    @model_validator(mode="after")
    def _check_source(self) -> "WorkloadSection":
        distribution = self.prompt_tokens is not None or self.output_tokens is not None
        if (self.trace is not None) + (self.dataset is not None) + distribution != 1:
            raise ValueError("give exactly one of trace, dataset, or prompt_tokens with output_tokens")
        if distribution and (self.prompt_tokens is None or self.output_tokens is None):
            raise ValueError("prompt_tokens and output_tokens belong together; give both")
        return self


Layout = Literal["disaggregated", "colocated", "mixed"]


class SearchSection(FrozenModel):
    """Limits of the planner's search."""

    layouts: tuple[Layout, ...] = Field(default=("disaggregated", "colocated", "mixed"), description="Those to try")
    max_tp: int = Field(default=8, ge=1, description="Ranks that divide every layer, at most")
    max_pp: int = Field(default=4, ge=1, description="Stages that divide the layers, at most")
    node_affinity: Literal["auto", "high", "low"] = Field(
        default="auto", description="low: KV must stay inside a node; auto: low if links between nodes are slow"
    )
    requests: int = Field(default=2000, ge=100, description="Requests per simulation, warm-up included")
    seed: int = Field(default=0, description="Of the simulated requests")


class SloFile(FrozenModel):
    """`objective`: the highest goodput per device on the cluster, or the cheapest part of the cluster that serves
    `workload.rate`."""

    model: ModelName = Field(description="Folder of a checkpoint, or the name of a published model, e.g. Llama-3.1-70B")
    cluster: ClusterSection
    slo: Annotated[SloClasses, Field(min_length=1)]
    workload: WorkloadSection
    objective: Literal["goodput", "cheapest"] = Field(
        default="goodput", description="Most goodput per device, or the lowest price that serves workload.rate"
    )
    search: SearchSection = SearchSection()

    @model_validator(mode="after")
    def _check(self) -> "SloFile":
        if self.objective == "cheapest" and self.workload.rate == "max":
            raise WrongSetting(("objective",), "cheapest needs workload.rate; set it to the requests per second")
        return self
