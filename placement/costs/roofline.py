"""Costs from a roofline model: each operator of each layer takes the time of its FLOPs, bytes and messages at the
measured efficiency of such operators (`placement.costs.efficiency`).

The roofline covers any model on any device in any parallel shape. `RooflineSource.error` and the tables of
`python -m bench.cost_model check` give its error.
"""

from collections.abc import Mapping

from tandem.core.model_shape import ModelShape
from tandem.core.parallel import ParallelShape
from tandem.placement.costs.cost_source import MAX_BATCH
from tandem.placement.costs.efficiency import efficiency, engine_overhead, step_error
from tandem.placement.costs.hardware import Device
from tandem.placement.costs.roofline_cost import RooflineCost

_RUNTIME_BYTES = 1.0e9  # context, workspaces, buffers of collectives; vLLM reports two thirds of it
_MIN_SEQUENCE_TOKENS = 256  # of KV; a sequence is admitted only with memory for as many


class RooflineSource:
    """A `placement.costs.cost_source.CostSource`. `devices` by their names in the cluster, with the cluster's links.

    `memory_share` of a device's memory holds weights, KV, the runtime and the activations of a step of `batch_tokens`
    prompt tokens and at most `max_batch` sampled tokens, those of the sequences whose KV fits. `engine` is the engine
    of `efficiency.yaml` with the overheads of a step. `devices_per_node`: tp must fit a node; a pipeline over several
    nodes uses the NIC, which must be known. A device without an entry is in nodes of any size.
    """

    __slots__ = (
        "_batch_tokens",
        "_cost_models",
        "_devices",
        "_devices_per_node",
        "_max_batch",
        "_memory_share",
        "_model",
        "_overhead",
    )

    def __init__(
        self,
        model: ModelShape,
        devices: Mapping[str, Device],
        *,
        memory_share: float = 0.9,
        engine: str = "vllm",
        batch_tokens: int = 8192,
        max_batch: int = MAX_BATCH,
        devices_per_node: Mapping[str, int] | None = None,
    ) -> None:
        """Raises ConfigError for an unknown engine."""
        self._model = model
        self._devices = dict(devices)
        self._memory_share = memory_share
        self._overhead = engine_overhead(engine)
        self._batch_tokens = batch_tokens
        self._max_batch = max_batch
        self._devices_per_node = dict(devices_per_node or {})
        self._cost_models: dict[tuple[str, ParallelShape], RooflineCost] = {}

    def cost_model(self, device: str, shape: ParallelShape) -> RooflineCost | None:
        if not self._is_legal(device, shape):
            return None
        key = device, shape
        if key not in self._cost_models:
            known = self._devices[device]
            self._cost_models[key] = RooflineCost(
                self._model,
                known,
                shape,
                efficiency(known.family),
                self._overhead,
                devices_per_node=self._devices_per_node.get(device, shape.num_ranks),
            )
        return self._cost_models[key]

    def kv_tokens(self, device: str, shape: ParallelShape) -> int:
        if not self._is_legal(device, shape):
            return 0
        model = self._model
        free = self._memory_share * self._devices[device].memory_bytes - _RUNTIME_BYTES
        free -= model.weight_bytes_per_rank(shape)
        free -= model.activation_bytes_per_rank(shape, self._batch_tokens, 0)
        sequence_bytes = model.activation_bytes_per_rank(shape, 0, 1)
        kv_bytes = model.kv_bytes_per_token_and_rank(shape)
        tokens = max(
            free / (kv_bytes + sequence_bytes / _MIN_SEQUENCE_TOKENS),  # fewer sequences than `max_batch` fit
            (free - self._max_batch * sequence_bytes) / kv_bytes,
        )
        return max(0, int(tokens))

    @property
    def error(self) -> float:
        return step_error()

    def _is_legal(self, device: str, shape: ParallelShape) -> bool:
        if device not in self._devices or not self._model.allows(shape):
            return False
        node_size = self._devices_per_node.get(device, shape.num_ranks)
        is_reachable = shape.num_ranks <= node_size or self._devices[device].nic_bytes_per_s > 0
        return max(shape.tp, shape.dp) <= node_size and is_reachable
