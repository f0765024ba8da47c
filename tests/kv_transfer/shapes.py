"""Pools of instances of any ranks and block sizes, and what they hold of a sequence, by plain indexing."""

from collections.abc import Sequence

import torch

from tandem.core.kv_layout import KvLayout


def random_pools(layout: KvLayout, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [layout.pool_of(rank).pool_bytes for rank in range(layout.num_ranks)]
    return [torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for size in sizes]


def shaped(pool: torch.Tensor, layout: KvLayout, rank: int) -> torch.Tensor:
    """[layer, kv, block, head, slot, byte]"""
    return pool.view(*layout.pool_of(rank).shape[:5], -1)


def tokens_of(
    pools: Sequence[torch.Tensor], layout: KvLayout, block_ids: Sequence[int], num_tokens: int
) -> torch.Tensor:
    """The model's whole KV of the tokens: [layer, kv, token, head, byte]. Replicas must be equal."""
    whole: dict[tuple[int, int], torch.Tensor] = {}
    for rank, pool in enumerate(pools):
        words = (
            shaped(pool, layout, rank)[:, :, block_ids].permute(0, 3, 1, 2, 4, 5).flatten(3, 4)[:, :, :, :num_tokens]
        )
        for i, layer in enumerate(layout.layers(rank)):
            for j, head in enumerate(layout.heads(rank)):
                assert torch.equal(whole.setdefault((layer, head), words[i, j]), words[i, j])
    return torch.stack([whole[key] for key in sorted(whole)])


def make_replicas_equal(pools: Sequence[torch.Tensor], layout: KvLayout) -> None:
    for rank in range(1, layout.num_ranks):
        if rank % layout.tp and layout.heads(rank) == layout.heads(rank - 1):
            pools[rank].copy_(pools[rank - 1])
