"""Which slices of the source ranks' pools a destination rank copies when the two sides are sharded differently. Pure.

An instance is tp x pp ranks: tensor parallelism shards the KV heads, pipeline parallelism the layers, both in
consecutive ranges whose sizes differ by one at most, larger ones first. With more tensor-parallel ranks than KV heads
each head lives on several ranks (replicas).

Today only instances of one rank exchange KV, and the list has one entry. (Stages of an instance may have other ranges
of layers than here, see `core.parallel.layers_of`.)
"""

from dataclasses import dataclass

from tandem.core.parallel import kv_heads_of, share
from tandem.core.transfer import KvSlice


@dataclass(frozen=True, slots=True)
class KvSharding:
    """How one instance's KV is spread over its ranks. Ranks count tensor-parallel first: rank = pp * tp_degree + tp."""

    num_layers: int
    num_kv_heads: int
    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        assert self.num_layers >= self.pp >= 1, "each pipeline stage has a layer"
        assert self.num_kv_heads >= 1
        assert self.tp >= 1

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp

    def layers(self, rank: int) -> range:
        """The model's layers whose KV that rank holds."""
        return share(self.num_layers, self.pp, rank // self.tp)

    def heads(self, rank: int) -> range:
        """The model's KV heads that rank holds."""
        return kv_heads_of(self.num_kv_heads, self.tp, rank % self.tp)


@dataclass(frozen=True, slots=True)
class SliceCopy:
    """Copy `source` of `source_rank`'s pool to `destination` of the destination rank's pool; both have one shape."""

    source_rank: int
    source: KvSlice
    destination: KvSlice


def plan_copies(source: KvSharding, destination: KvSharding, destination_rank: int) -> list[SliceCopy]:
    """The copies that fill everything that one destination rank holds, each element once.

    Destination ranks that need the same head read different replicas in turn.
    """
    assert (source.num_layers, source.num_kv_heads) == (destination.num_layers, destination.num_kv_heads)
    assert 0 <= destination_rank < destination.num_ranks
    held_layers, held_heads = destination.layers(destination_rank), destination.heads(destination_rank)
    copies = []
    for stage in range(source.pp):
        layers = _overlap(held_layers, source.layers(stage * source.tp))
        for tp_rank in _distinct_holders(source, turn=destination_rank):
            source_rank = stage * source.tp + tp_rank
            heads = _overlap(held_heads, source.heads(source_rank))
            if layers and heads:
                copies.append(
                    SliceCopy(
                        source_rank=source_rank,
                        source=_slice_in(layers, heads, source.layers(source_rank), source.heads(source_rank)),
                        destination=_slice_in(layers, heads, held_layers, held_heads),
                    )
                )
    return copies


def _distinct_holders(grid: KvSharding, turn: int) -> list[int]:
    """Tensor-parallel ranks that together hold each head once; `turn` picks among replicas."""
    holders: dict[range, list[int]] = {}
    for tp_rank in range(grid.tp):
        holders.setdefault(grid.heads(tp_rank), []).append(tp_rank)
    return [ranks[turn % len(ranks)] for ranks in holders.values()]


def _overlap(left: range, right: range) -> range:
    return range(max(left.start, right.start), min(left.stop, right.stop))


def _slice_in(layers: range, heads: range, held_layers: range, held_heads: range) -> KvSlice:
    """Ranges of the model, as counted in the pool of a rank that holds `held_*`."""
    return KvSlice(
        layer_begin=layers.start - held_layers.start,
        layer_end=layers.stop - held_layers.start,
        head_begin=heads.start - held_heads.start,
        head_end=heads.stop - held_heads.start,
    )
