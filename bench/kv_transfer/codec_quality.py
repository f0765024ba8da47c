"""How much does a codec of KV change what a model says next?

The KV of a prompt goes through the codec, by the code that sends and receives it. The tokens that really follow are
then given to the model, with that KV and with the KV as it was. The two distributions of each next token are compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tandem.core.kv_codec import KvCodec
from tandem.core.kv_layout import KvLayout
from tandem.kv_transfer.arrival import OwnPools, PairPlan
from tandem.kv_transfer.block_coder import BlockCoder, KvCodes
from tandem.kv_transfer.blocks import LeavingBlocks, PoolView

_BLOCK_SIZE = 16
_CHUNK_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Quality:
    """Over all next tokens. `kl` is KL(whole KV || coded KV) in nats. `nats_more` is the change of the mean loss."""

    codec: KvCodec
    num_tokens: int
    wire_share: float  # of the bytes that the KV has in memory
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    nats_more: float


@torch.inference_mode()
def measure_quality(
    model: PreTrainedModel, texts: Sequence[Tensor], num_prompt: int, codecs: Sequence[KvCodec], codes: KvCodes | None
) -> list[Quality]:
    """`texts` are rows of token ids; of each, the first `num_prompt` are the prompt. `codes`: see `BlockCoder`."""
    kls: dict[KvCodec, list[Tensor]] = {codec: [] for codec in codecs}
    agreements: dict[KvCodec, list[Tensor]] = {codec: [] for codec in codecs}
    losses: dict[KvCodec, list[float]] = {codec: [] for codec in codecs}
    shares = dict.fromkeys(codecs, 1.0)
    for text in texts:
        cache = DynamicCache()
        model(input_ids=text[None, :num_prompt], past_key_values=cache)
        kv = torch.stack([torch.cat([layer.keys, layer.values]) for layer in cache.layers])
        whole = _log_probabilities(model, kv, text, num_prompt)
        whole_loss = -whole[:-1].gather(1, text[num_prompt + 1 :, None]).mean().item()
        for codec in codecs:
            arrived, shares[codec] = sent_kv(kv, codec, codes)
            coded = _log_probabilities(model, arrived, text, num_prompt)
            kls[codec].append((whole.exp() * (whole - coded)).sum(-1))
            agreements[codec].append((whole.argmax(-1) == coded.argmax(-1)).float())
            losses[codec].append(-coded[:-1].gather(1, text[num_prompt + 1 :, None]).mean().item() - whole_loss)
    result = []
    for codec in codecs:
        kl, agreement = torch.cat(kls[codec]), torch.cat(agreements[codec])
        result.append(
            Quality(
                codec=codec,
                num_tokens=len(kl),
                wire_share=shares[codec],
                kl_mean=kl.mean().item(),
                kl_p99=kl.quantile(0.99).item(),
                top1_agreement=agreement.mean().item(),
                nats_more=fmean(losses[codec]),
            )
        )
    return result


def sent_kv(kv: Tensor, codec: KvCodec, codes: KvCodes | None) -> tuple[Tensor, float]:
    """`kv` [layer, kv, head, token, head_dim] as it arrives, and the share of its bytes that was sent."""
    layers, _, heads, num_tokens, head_dim = kv.shape
    num_blocks = -(-num_tokens // _BLOCK_SIZE)
    dtype = str(kv.dtype).removeprefix("torch.")
    layout = KvLayout(layers, num_blocks, heads, _BLOCK_SIZE, head_dim, dtype, "bench")
    padded = torch.zeros(layers, 2, heads, num_blocks * _BLOCK_SIZE, head_dim, dtype=kv.dtype)
    padded[:, :, :, :num_tokens] = kv
    blocks = padded.view(layers, 2, heads, num_blocks, _BLOCK_SIZE, head_dim)
    pool = blocks.transpose(2, 3).contiguous()
    target = torch.zeros_like(pool)
    coder = None if codec is KvCodec.NONE else BlockCoder(codec, layout, codes)
    source = PoolView.over(pool, layout)
    leaving = LeavingBlocks(source, layout, range(num_blocks), num_tokens, _CHUNK_BYTES, coder=coder)
    plan = PairPlan.make(layout, OwnPools(layout, [target]), codec, codes)
    (arriving,) = plan.arriving(range(num_blocks), num_tokens, _CHUNK_BYTES)
    staging, sender_scratch, scratch = (torch.empty(leaving.staging_bytes, dtype=torch.uint8) for _ in range(3))
    for chunk in leaving.chunks:
        sent = leaving.pack(chunk, staging, sender_scratch)
        arriving.scatter(chunk, arriving.unpack(chunk, sent, scratch))
    arrived = target.view(pool.shape).transpose(2, 3).flatten(3, 4)[:, :, :, :num_tokens]
    return arrived, leaving.wire_bytes / leaving.kv_bytes


def _log_probabilities(model: PreTrainedModel, kv: Tensor, text: Tensor, num_prompt: int) -> Tensor:
    """Of the token after each one from the end of the prompt on: [token, vocabulary]."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(kv):
        cache.update(keys[None].contiguous(), values[None].contiguous(), layer)
    logits: Tensor = model(input_ids=text[None, num_prompt:], past_key_values=cache).logits
    return logits[0].float().log_softmax(-1)
