"""The part of a model that one rank computes: Megatron's tensor parallelism, and pipeline stages of whole layers.

Within a stage (arXiv 1909.08053, section 3) Q, K, V, gate and up are divided by output features, and the matrices after
them, o and down, by the corresponding input features. So each rank has a summand of their results, and the stage
all-reduces it. Embedding and output head are divided by tokens of the vocabulary; norms are on every rank.
"""

from dataclasses import dataclass

from tandem.core.errors import ConfigError
from tandem.core.model_spec import ModelSpec
from tandem.core.parallel import ParallelShape, kv_heads_of, layers_of, query_heads_of, share


@dataclass(frozen=True, slots=True)
class Shard:
    """Ranges of the model: its layers, query heads, KV heads, MLP features, and tokens of the vocabulary.

    Sizes of ranks may differ by one. `kv_heads` overlap where `shape.tp` exceeds their number.
    """

    shape: ParallelShape
    rank: int
    layers: range
    heads: range
    kv_heads: range
    inner: range
    vocab: range

    @property
    def tp_rank(self) -> int:
        return self.rank % self.shape.tp

    @property
    def stage(self) -> int:
        return self.rank // self.shape.tp

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.shape.pp - 1

    @property
    def adds_biases(self) -> bool:
        """Whether this rank adds the bias of a matrix whose result the stage sums."""
        return self.tp_rank == 0


def shard_of(spec: ModelSpec, shape: ParallelShape, rank: int) -> Shard:
    """Raises ConfigError for a shape that the model cannot be divided into."""
    assert 0 <= rank < shape.num_ranks
    if shape.tp > spec.num_heads:
        raise ConfigError(f"tp {shape.tp} is more than the model's {spec.num_heads} attention heads")
    if shape.tp > min(spec.intermediate_size, spec.vocab_size):
        raise ConfigError(f"tp {shape.tp} is more than the model's MLP features or its vocabulary")
    if shape.pp > spec.num_layers:
        raise ConfigError(f"pp {shape.pp} is more than the model's {spec.num_layers} layers")
    tp_rank = rank % shape.tp
    return Shard(
        shape=shape,
        rank=rank,
        layers=layers_of(spec.num_layers, shape.pp, rank // shape.tp, _head_cost(spec)),
        heads=query_heads_of(spec.num_heads, spec.num_kv_heads, shape.tp, tp_rank),
        kv_heads=kv_heads_of(spec.num_kv_heads, shape.tp, tp_rank),
        inner=share(spec.intermediate_size, shape.tp, tp_rank),
        vocab=share(spec.vocab_size, shape.tp, tp_rank),
    )


def elements_of(heads: range, head_dim: int) -> range:
    """The rows or columns of a weight that belong to `heads`."""
    return range(heads.start * head_dim, heads.stop * head_dim)


def _head_cost(spec: ModelSpec) -> float:
    """Weights of the output head relative to those of a layer: decode's time is that of reading weights. The embedding
    reads one row per token."""
    attention = 2 * spec.hidden_size * (spec.num_heads + spec.num_kv_heads) * spec.head_dim
    mlp = (2 if spec.family == "opt" else 3) * spec.hidden_size * spec.intermediate_size
    return spec.vocab_size * spec.hidden_size / (attention + mlp)
