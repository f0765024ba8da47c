"""The SLO file: the planner's input, with model, cluster, SLO classes, workload and objective.

`core.config_file.load_config(path, SloFile)` reads it. The planner's output is a `core.plan.Plan`.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from tandem.core.anchored_path import AnchoredPath, ModelName
from tandem.core.byte_size import Bytes
from tandem.core.frozen_model import FrozenModel, WrongSetting
from tandem.core.instance_section import MAX_PARALLEL
from tandem.core.kv_codec import KvCodecName
from tandem.core.precision import AS_STORED, Precision
from tandem.core.slo import SloClasses

MAX_REQUESTS = 10_000_000
"""Upper bound for one simulation; more would take days."""


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


class _Lengths(FrozenModel):
    """Lengths of prompts or of answers: a distribution of this mean, truncated to [min, max], or a measured table."""

    mean: float | None = Field(default=None, gt=0, description="Tokens")
    distribution: Literal["log-normal", "exponential", "pareto"] = Field(
        default="log-normal", description="pareto has the heaviest tail"
    )
    cv: float = Field(
        default=1.0, ge=0, description="Standard deviation divided by the mean; log-normal only; 0 is a fixed length"
    )
    min: int = Field(default=1, ge=1, description="Tokens")
    max: int = Field(default=1 << 20, ge=1, description="Tokens")
    table: AnchoredPath | None = Field(
        default=None,
        description="CSV, .gz or not, with the columns tokens, or tokens_from and tokens_to, and optionally weight",
    )

    def _sources(self) -> dict[str, bool]:
        """The settings of which exactly one is given, and whether each is."""
        return {"mean": self.mean is not None, "table": self.table is not None}

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        sources = self._sources()
        if sum(sources.values()) != 1:
            raise ValueError(f"give exactly one of {', '.join(sources)}")
        if self.mean is None:
            for name in ("distribution", "cv", "min", "max"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise WrongSetting((name,), "belongs to mean; remove it")
        elif not self.min <= self.mean <= self.max:
            raise WrongSetting(("mean",), f"{self.mean:g} is not between min {self.min} and max {self.max}")
        elif self.distribution != "log-normal" and self.cv != 1.0:
            raise WrongSetting(("cv",), f"belongs to log-normal; {self.distribution} has only a mean, min and max")
        return self


class LengthPart(_Lengths):
    """Some of the lengths of a mixture."""

    share: float = Field(gt=0, description="Relative to the other parts")


class LengthSection(_Lengths):
    """A distribution, a measured table, or a mixture of them, e.g. of short and long answers."""

    mixture: tuple[LengthPart, ...] = Field(default=(), description="Each length comes from one of these parts")

    def _sources(self) -> dict[str, bool]:
        return super()._sources() | {"mixture": bool(self.mixture)}


class PrefixSection(FrozenModel):
    """`share` of the requests begin with one of `groups` common prefixes of `tokens` tokens, e.g. system prompts."""

    share: float = Field(ge=0, le=1, description="Of the requests that begin with a common prefix")
    groups: int = Field(default=1, ge=1, description="Different prefixes")
    tokens: int = Field(ge=1, description="Length of each prefix")


class ArrivalSection(FrozenModel):
    process: Literal["poisson", "gamma", "weibull"] = Field(default="poisson", description="Times between arrivals")
    cv: float = Field(
        default=1.0, ge=0.001, le=100, description="Variation coefficient of times between arrivals; gamma and weibull"
    )


class _RequestSource(FrozenModel):
    """Lengths, arrivals and shared prefixes."""

    dataset: str | None = Field(default=None, description="Lengths of a built-in data set, e.g. sharegpt")
    lengths: AnchoredPath | None = Field(
        default=None,
        description="CSV, .gz or not, whose rows are drawn: columns prompt_tokens, output_tokens, optionally weight",
    )
    prompt_tokens: LengthSection | None = None
    output_tokens: LengthSection | None = None
    arrivals: ArrivalSection = ArrivalSection()
    prefix: PrefixSection | None = None

    def _check_one_source(self, others: Mapping[str, bool]) -> None:
        """`others`: other settings that define lengths, and whether each is given."""
        distribution = self.prompt_tokens is not None or self.output_tokens is not None
        sources = {**others, "dataset": self.dataset is not None, "lengths": self.lengths is not None}
        if sum(sources.values()) + distribution != 1:
            raise ValueError(f"give exactly one of {', '.join(sources)}, or prompt_tokens with output_tokens")
        if distribution and (self.prompt_tokens is None or self.output_tokens is None):
            raise ValueError("prompt_tokens and output_tokens belong together; give both")


class PopulationSection(_RequestSource):
    """Requests of one kind, such as those of one application: they arrive independently of the others."""

    name: str = Field(min_length=1, description="For reports")
    share: float = Field(gt=0, description="Of the requests of the workload, relative to the other populations")
    slo_class: str | None = Field(
        default=None, description="SLO class of all its requests, by name; default: drawn by the shares of the classes"
    )

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        self._check_one_source({})
        return self


def _check_rate(value: object) -> object:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value != "max" and not (is_number and 0 < float(value) < math.inf):  # type: ignore[arg-type]
        raise ValueError(f"{value!r} is neither a number of requests per second above 0 nor max")
    return value


Rate = Annotated[float | Literal["max"], BeforeValidator(_check_rate)]


class WorkloadSection(_RequestSource):
    """Lengths come from `trace`, `dataset`, `lengths`, from `prompt_tokens` and `output_tokens`, or from the
    `populations`. A trace also has arrivals; populations have arrivals and prefixes of their own."""

    trace: AnchoredPath | None = Field(default=None, description="CSV or JSON lines, .gz or not: arrivals and lengths")
    populations: tuple[PopulationSection, ...] = Field(default=(), description="Several kinds of requests at once")
    max_total_tokens: int | None = Field(default=None, ge=2, description="Longer requests are left out")
    cover: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Share of the time of a trace in whose windows the targets must be met; 1: in the worst one, too",
    )
    length_scale: float = Field(default=1.0, gt=0, description="Multiplies all lengths, to fit a smaller model")
    rate: Rate = Field(default="max", description="Requests per second, or max: the highest rate within the SLO")

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        self._check_one_source({"trace": self.trace is not None, "populations": bool(self.populations)})
        if not self.populations:
            return self
        for name, is_set in (("arrivals", self.arrivals != ArrivalSection()), ("prefix", self.prefix is not None)):
            if is_set:
                raise WrongSetting((name,), "belongs to each population; move it there")
        names = [population.name for population in self.populations]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise WrongSetting(
                    ("populations", index), f"two populations are called '{name}'; give each a name of its own"
                )
        return self


Layout = Literal["disaggregated", "colocated", "mixed"]


class SearchSection(FrozenModel):
    """Limits of the planner's search."""

    layouts: tuple[Layout, ...] = Field(default=("disaggregated", "colocated", "mixed"), description="Those to try")
    max_tp: int = Field(default=8, ge=1, le=MAX_PARALLEL, description="Ranks that divide every layer, at most")
    max_pp: int = Field(default=4, ge=1, le=MAX_PARALLEL, description="Stages that divide the layers, at most")
    max_dp: int = Field(
        default=1,
        ge=1,
        description="Ranks of a node that share the experts of a mixture, each with sequences of its own, at most",
    )
    only_served: bool = Field(
        default=True,
        description="Only what `tandem serve` runs; false also tries, where KV stays inside nodes, instances that have "
        "stages on the same several nodes",
    )
    node_affinity: Literal["auto", "high", "low"] = Field(
        default="auto", description="low: KV must stay inside a node; auto: low if links between nodes are slow"
    )
    requests: int = Field(
        default=2000, ge=100, le=MAX_REQUESTS, description="Requests per simulation, warm-up included"
    )
    seed: int = Field(default=0, ge=0, description="Of the simulated requests")


class SloFile(FrozenModel):
    """`objective`: the highest goodput per device on the cluster, or the cheapest part of the cluster that serves
    `workload.rate`."""

    model: ModelName = Field(description="Folder of a checkpoint, or the name of a published model, e.g. Llama-3.1-70B")
    precision: Precision = AS_STORED
    cluster: ClusterSection
    slo: Annotated[SloClasses, Field(min_length=1)]
    workload: WorkloadSection
    kv_codec: KvCodecName = Field(
        default="none",
        description="How KV is coded on its way between nodes, as the setting of instances says; the plan has it, too",
    )
    objective: Literal["goodput", "cheapest"] = Field(
        default="goodput", description="Most goodput per device, or the lowest price that serves workload.rate"
    )
    search: SearchSection = SearchSection()

    @model_validator(mode="after")
    def _check(self) -> "SloFile":
        if self.objective == "cheapest" and self.workload.rate == "max":
            raise WrongSetting(("objective",), "cheapest needs workload.rate; set it to the requests per second")
        classes = [slo.name for slo in self.slo]
        for index, population in enumerate(self.workload.populations):
            if population.slo_class is not None and population.slo_class not in classes:
                raise WrongSetting(
                    ("workload", "populations", index, "slo_class"),
                    f"'{population.slo_class}' is none of the SLO classes: {', '.join(classes)}",
                )
        return self
