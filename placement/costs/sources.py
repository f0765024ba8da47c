"""The cost source of an SLO file: calibrations for the devices that have one, the roofline for the others."""

import math
from collections.abc import Mapping

from tandem.core.cost_model import CostModel
from tandem.core.errors import ConfigError
from tandem.core.model_shape import ModelShape
from tandem.core.parallel import ParallelShape
from tandem.core.precision import AS_STORED
from tandem.core.slo_file import SloFile
from tandem.placement.cluster import Cluster
from tandem.placement.costs.calibration import CalibratedSource
from tandem.placement.costs.cost_source import CostSource
from tandem.placement.costs.roofline import RooflineSource


def cost_source_of(slo: SloFile, model: ModelShape) -> CostSource:
    """Costs of `model` on the devices of the SLO file's cluster, by their names in the catalogue. Raises ConfigError
    for an unknown device, and for a calibration that cannot be read or belongs to another model."""
    section = slo.cluster
    cluster = Cluster.of(section)
    for name, calibration in cluster.calibrations.items():
        if calibration.model != model.name:
            raise ConfigError(
                f"the calibration of {name} belongs to the model {calibration.model}, not to {model.name}; run "
                f"`tandem profile` for {model.name}"
            )
    if cluster.calibrations and slo.precision != AS_STORED:
        raise ConfigError(
            f"the calibration of {next(iter(cluster.calibrations))} was measured in the numbers of the checkpoint; "
            "remove calibration or precision"
        )
    measured = CalibratedSource(
        cluster.calibrations, kv_memory_bytes=section.kv_memory, devices_per_node=cluster.devices_per_node
    )
    rest = {name: device for name, device in cluster.devices.items() if name not in cluster.calibrations}
    if not rest:
        return measured
    roofline: CostSource = RooflineSource(
        model, rest, memory_share=section.memory_share, devices_per_node=cluster.devices_per_node
    )
    if section.kv_memory is not None:
        roofline = FixedPool(roofline, model, section.kv_memory)
    if not cluster.calibrations:
        return roofline
    return SourcePerDevice(dict.fromkeys(rest, roofline) | dict.fromkeys(cluster.calibrations, measured))


class SourcePerDevice:
    """A CostSource for each device."""

    def __init__(self, sources: Mapping[str, CostSource]) -> None:
        self._sources = dict(sources)

    def cost_model(self, device: str, shape: ParallelShape) -> CostModel | None:
        source = self._sources.get(device)
        return None if source is None else source.cost_model(device, shape)

    def kv_tokens(self, device: str, shape: ParallelShape) -> int:
        source = self._sources.get(device)
        return 0 if source is None else source.kv_tokens(device, shape)

    @property
    def error(self) -> float:
        """The largest error; NaN if one is unknown."""
        errors = [source.error for source in self._sources.values()]
        return math.nan if any(map(math.isnan, errors)) else max(errors)


class FixedPool:
    """Another source with a configured KV pool of `pool_bytes` on each rank."""

    def __init__(self, source: CostSource, model: ModelShape, pool_bytes: int) -> None:
        self._source = source
        self._model = model
        self._pool_bytes = pool_bytes

    def cost_model(self, device: str, shape: ParallelShape) -> CostModel | None:
        return self._source.cost_model(device, shape)

    def kv_tokens(self, device: str, shape: ParallelShape) -> int:
        """0 if the weights do not fit."""
        if self._source.kv_tokens(device, shape) == 0:
            return 0
        return int(self._pool_bytes / self._model.kv_bytes_per_token_and_rank(shape))

    @property
    def error(self) -> float:
        return self._source.error
