"""Pools of instances of any ranks and block sizes, and what they hold of a sequence, by plain indexing."""

from collections.abc import Sequence

import torch

from tandem.core.kv_codec import KvCodec
from tandem.core.kv_layout import KvLayout
from tandem.kv_transfer.torch_codec import TorchKvCodes


def random_pools(layout: KvLayout, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [layout.pool_of(rank).pool_bytes for rank in range(layout.num_ranks)]
    return [torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for size in sizes]


def random_floats(layout: KvLayout, seed: int) -> list[torch.Tensor]:
    """As `random_pools`; channels are of very unlike size, and not all around zero."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.empty(layout.head_dim).uniform_(-3, 3, generator=generator)
    pools = []
    for rank in range(layout.num_ranks):
        values = torch.randn(layout.pool_of(rank).shape, generator=generator) * scale + scale.flip(0)
        pools.append(values.to(getattr(torch, layout.dtype)).view(-1).view(torch.uint8))
    return pools


def coded(
    pools: Sequence[torch.Tensor], layout: KvLayout, block_ids: Sequence[int], num_tokens: int, codec: KvCodec
) -> list[torch.Tensor]:
    """What becomes of the pools when each block of these tokens is coded by itself, those of the window excepted."""
    num_coded = (num_tokens - codec.whole_tokens) // layout.block_size if codec.whole_tokens else len(block_ids)
    result = [pool.clone() for pool in pools]
    for rank, pool in enumerate(result):
        words = pool.view(getattr(torch, layout.dtype)).view(layout.pool_of(rank).shape)
        for i, block_id in enumerate(block_ids[: max(0, num_coded)]):
            block = words[:, :, block_id].contiguous()
            last = num_tokens - i * layout.block_size
            block[:, :, :, last:] = block[:, :, :, last - 1 : last]
            head_blocks = block.shape[0] * block.shape[2]
            code = torch.empty(head_blocks * codec.pair_bytes(layout.block_size, layout.head_dim), dtype=torch.uint8)
            TorchKvCodes().encode(codec, block, code)
            TorchKvCodes().decode(codec, code, block)
            words[:, :, block_id] = block
    return result


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
