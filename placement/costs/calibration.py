"""What `tandem profile` measured of one model on the device at hand, and the costs of its instances for the planner."""

import math
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from tandem.core.config_file import load_config
from tandem.core.errors import ConfigError
from tandem.core.frozen_model import FrozenModel
from tandem.core.parallel import ParallelShape
from tandem.placement.costs.rank_messages import Collective, MessageCost, MessageCosts, StepMessages
from tandem.placement.costs.resharding import KvTransfer
from tandem.placement.costs.serving import PathCosts, ServingCosts
from tandem.placement.costs.step_fit import CalibratedCost, FitError, Measurement, Terms
from tandem.placement.simulator.deployment import NetworkSpec, RouterSpec

_ONE_RANK = ParallelShape(1, 1)


class FollowingSteps(FrozenModel):
    """Steps of an instance of several pipeline stages that follow each other, one in each stage: chunks of prompts, or
    groups of decoding sequences. The seconds of a step are those from the end of the one before to its own end."""

    terms: Terms
    error: FitError
    measurements: tuple[Measurement, ...] = ()


class ShapeCalibration(FrozenModel):
    """Of an instance of several ranks, whose steps were measured as those of one rank are: with all ranks running, on
    cores and memory that they share. `threads` of the calibration is each rank's. `terms`, `error` and `measurements`
    are of steps that are computed one at a time."""

    tp: int = Field(default=1, ge=1)
    pp: int = Field(default=1, ge=1)
    kv_bytes_per_token: float = Field(gt=0, description="Of the rank that holds most")
    messages: StepMessages = StepMessages()
    terms: Terms
    error: FitError
    following: FollowingSteps | None = Field(
        default=None, description="With several stages; None: steps were measured one at a time only"
    )
    serving: ServingCosts = ServingCosts()
    measurements: tuple[Measurement, ...] = ()

    @property
    def shape(self) -> ParallelShape:
        return ParallelShape(self.tp, self.pp)


class Calibration(FrozenModel):
    """The file that `tandem profile` writes: of one model, in one dtype, on one device with a number of threads.

    `terms`, `error`, `serving` and `measurements` are of an instance of one rank.
    """

    version: Literal[1] = 1
    measured_on: date
    device: str = Field(description="As the machine calls it, e.g. the CPU's model name")
    cores: int = Field(ge=1)
    model: str
    weights_hash: str = Field(description="Of the checkpoint's weights")
    dtype: str
    ops: str
    threads: int = Field(ge=0, description="Of a rank")
    kv_bytes_per_token: float = Field(gt=0)
    kv_memory_bytes: int = Field(gt=0, description="KV pool of a rank")
    terms: Terms
    error: FitError
    serving: ServingCosts = ServingCosts()
    request_path: PathCosts | None = Field(default=None, description="None: no cluster was measured")
    shapes: tuple[ShapeCalibration, ...] = Field(default=(), description="Instances of several ranks")
    collectives: tuple[Collective, ...] = Field(default=(), description="Between ranks of one instance")
    transfers: tuple[KvTransfer, ...] = Field(default=(), description="KV between instances of these shapes")
    measurements: tuple[Measurement, ...] = ()

    @model_validator(mode="after")
    def _check_shapes(self) -> "Calibration":
        shapes = [_ONE_RANK, *(one.shape for one in self.shapes)]
        if len(set(shapes)) < len(shapes):
            raise ValueError("each shape must be there once, and that of one rank not in shapes")
        return self

    def shape_calibration(self, shape: ParallelShape) -> ShapeCalibration | None:
        """Of several ranks; None if it was not measured."""
        return next((one for one in self.shapes if one.shape == shape), None)

    def serving_of(self, shape: ParallelShape) -> ServingCosts:
        """Of the shape where it was measured, else of one rank."""
        measured = self.shape_calibration(shape)
        return self.serving if measured is None else measured.serving

    def engine_cost(self, shape: ParallelShape = _ONE_RANK) -> CalibratedCost | None:
        """The engine alone. None if the shape was not measured."""
        return self._cost(shape, None, 0.0)

    def cost(self, shape: ParallelShape = _ONE_RANK, *, contended: float = 1.0) -> CalibratedCost | None:
        """In a running instance. None if the shape was not measured. `contended`: see `CalibratedCost`."""
        return self._cost(shape, self.serving_of(shape), contended)

    def with_serving(self, shape: ParallelShape, serving: ServingCosts) -> "Calibration":
        """With other serving costs of this shape, which was measured."""
        if shape == _ONE_RANK:
            return self.model_copy(update={"serving": serving})
        shapes = (one.model_copy(update={"serving": serving}) if one.shape == shape else one for one in self.shapes)
        return self.model_copy(update={"shapes": tuple(shapes)})

    def _cost(self, shape: ParallelShape, serving: ServingCosts | None, contended: float) -> CalibratedCost | None:
        if shape == _ONE_RANK:
            return CalibratedCost(self.terms, serving, contended=contended)
        measured = self.shape_calibration(shape)
        if measured is None:
            return None
        messages = MessageCosts(
            measured.messages, self._message_cost("all_reduce", shape.tp), self._message_cost("send", shape.pp)
        )
        following = None if measured.following is None else measured.following.terms
        return CalibratedCost(
            measured.terms,
            serving,
            contended=contended,
            messages=messages,
            num_stages=shape.pp,
            following=following,
        )

    def _message_cost(self, operation: str, ranks: int) -> MessageCost | None:
        found = (one.cost for one in self.collectives if (one.operation, one.ranks) == (operation, ranks))
        return next(found, None)

    def router_spec(self) -> RouterSpec:
        """Of the cluster that was measured; free of cost if none was."""
        return RouterSpec() if self.request_path is None else self.request_path.router_spec()

    def network_spec(self, *, contended: float = 1.0) -> NetworkSpec:
        """All instances on this machine. `contended`: share of the time during which they compute."""
        if self.request_path is None:
            return NetworkSpec(self.kv_bytes_per_token)
        return self.request_path.network_spec(self.kv_bytes_per_token, contended)


def load_calibration(path: Path) -> Calibration:
    """Raises ConfigError."""
    return load_config(path, Calibration)


class CalibratedSource:
    """A `placement.costs.cost_source.CostSource`: devices by their names in the cluster, each with its calibration.

    Shapes that were not measured are unknown. `kv_memory_bytes`: of one rank's KV pool; None takes the size that was
    measured with. `devices_per_node`: of the largest node; an instance that takes them all, or several nodes, computes
    alone, while others count as if all devices of their node computed all the time.
    """

    def __init__(
        self,
        calibrations: Mapping[str, Calibration],
        *,
        kv_memory_bytes: int | None = None,
        devices_per_node: Mapping[str, int] | None = None,
    ) -> None:
        """Raises ConfigError if the calibrations are of different models."""
        models = {calibration.model for calibration in calibrations.values()}
        if len(models) > 1:
            raise ConfigError(f"the calibrations are of different models: {', '.join(sorted(models))}")
        self._calibrations = dict(calibrations)
        self._kv_memory_bytes = kv_memory_bytes
        sizes = devices_per_node or {}
        self._costs = {
            (name, shape): one.cost(shape, contended=0.0 if shape.num_ranks >= sizes.get(name, math.inf) else 1.0)
            for name, one in calibrations.items()
            for shape in (_ONE_RANK, *(measured.shape for measured in one.shapes))
        }

    def cost_model(self, device: str, shape: ParallelShape) -> CalibratedCost | None:
        return self._costs.get((device, shape))

    def kv_tokens(self, device: str, shape: ParallelShape) -> int:
        if (device, shape) not in self._costs:
            return 0
        calibration = self._calibrations[device]
        measured = calibration.shape_calibration(shape)
        per_token = calibration.kv_bytes_per_token if measured is None else measured.kv_bytes_per_token
        return int((self._kv_memory_bytes or calibration.kv_memory_bytes) // per_token)

    @property
    def error(self) -> float:
        """The worst median of any shape of any calibration."""
        errors = [calibration.error for calibration in self._calibrations.values()]
        for calibration in self._calibrations.values():
            for shape in calibration.shapes:
                errors += [shape.error] if shape.following is None else [shape.error, shape.following.error]
        return max((error.median for error in errors), default=float("nan"))
