"""Links with a codec: what arrives is what each block's code gives, over gloo; over shared memory nothing is coded."""

import random

import pytest
import torch

from tandem.core.errors import IncompatiblePeerError, TransferError
from tandem.core.kv_codec import KvCodec
from tandem.core.kv_frontier import KvFrontier
from tandem.core.kv_layout import KvLayout
from tandem.core.transfer import LinkOffer, LinkReply, Transport
from tandem.kv_transfer.process_groups import GlooGroup
from tandem.kv_transfer.sender import KvSender
from tests.kv_transfer.holder import tokens
from tests.kv_transfer.shapes import coded, make_replicas_equal, random_floats, tokens_of
from tests.kv_transfer.test_shapes import NUM_BLOCKS, fetch, fetching, layout
from tests.kv_transfer.test_streaming import STEPS, THEIRS, streaming

CODECS = (KvCodec.FP8, KvCodec.INT8, KvCodec.INT4)
PAIRS = [
    (layout(), layout()),
    (layout(tp=4), layout(tp=3)),  # heads on several ranks, on both sides
    (layout(16, layers_per_stage=(1, 4)), layout(4, tp=2)),
]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("pair", PAIRS, ids=range(len(PAIRS)))
async def test_coded_kv_arrives(pair: tuple[KvLayout, KvLayout], codec: KvCodec) -> None:
    source, destination = pair
    rng = random.Random(5)
    async with fetching(source, destination, transport=Transport.GLOO, codec=codec) as (prefill, receiver, pools):
        for pool, floats in zip(prefill.pools, random_floats(source, 4), strict=True):
            pool.tensor.copy_(floats)
        make_replicas_equal([pool.tensor for pool in prefill.pools], source)
        for epoch in range(3):
            most = NUM_BLOCKS * destination.block_size // source.block_size
            theirs = rng.sample(range(NUM_BLOCKS), rng.randint(1, min(12, most)))
            num_tokens = len(tokens(len(theirs), source))
            ours = rng.sample(range(NUM_BLOCKS), destination.blocks_for(num_tokens))
            await fetch(prefill, receiver, theirs, ours, epoch)
            sent = coded([pool.tensor for pool in prefill.pools], source, theirs, num_tokens, codec)
            expected = tokens_of(sent, source, theirs, num_tokens)
            assert torch.equal(tokens_of(pools, destination, ours, num_tokens), expected)
        (of_reader,), (of_sender,) = receiver.links(), prefill.sender.links()
        assert of_reader.codec == of_sender.codec == codec.value
        assert of_reader.wire_bytes == of_sender.wire_bytes > 0


async def test_fewer_bytes_are_sent() -> None:
    """Of bf16 with blocks of 16 tokens and heads of 64. The last 64 of 383 tokens are whole but for int8."""
    wide = KvLayout(2, NUM_BLOCKS, 2, 16, 64, "bfloat16", "w")
    share = {}
    for codec in KvCodec:
        async with fetching(wide, wide, transport=Transport.GLOO, codec=codec) as (prefill, receiver, _):
            prefill.pools[0].tensor.zero_()
            await fetch(prefill, receiver, list(range(24)), list(range(24)), 0)
            (stats,) = receiver.links()
            share[codec] = round(stats.wire_bytes / stats.transfer_bytes, 3)
    assert share == {KvCodec.NONE: 1.0, KvCodec.FP8: 0.606, KvCodec.INT8: 0.578, KvCodec.INT4: 0.468}


async def test_shared_memory_is_copied_as_it_is() -> None:
    async with fetching(layout(), layout(), codec=KvCodec.INT4) as (prefill, receiver, pools):
        await fetch(prefill, receiver, [1, 2], [3, 4], 0)
        num_tokens = len(tokens(2, layout()))
        expected = tokens_of([prefill.pool.tensor], layout(), [1, 2], num_tokens)
        assert torch.equal(tokens_of(pools, layout(), [3, 4], num_tokens), expected)
        (stats,) = receiver.links()
        assert (stats.codec, stats.wire_bytes, stats.transport) == ("none", 0, "shared_memory")


@pytest.mark.parametrize("codec", CODECS)
async def test_streamed_parts_are_coded_as_the_whole(codec: KvCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KvCodec, "whole_tokens", 12)  # of 47; it begins and ends within a block
    async with streaming(Transport.GLOO, codec=codec) as stream:
        stream.final = random_floats(stream.source, 3)
        for blocks, next_blocks, layers in STEPS:
            await stream.compute(KvFrontier(1, blocks, next_blocks, layers, 5))
        fetched = await stream.finish()
        assert fetched.streamed_bytes == fetched.bytes
        stream.final = coded(stream.final, stream.source, THEIRS, stream.num_tokens, codec)
        stream.check()


async def test_a_byte_corrupted_on_the_way_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    send = GlooGroup.send

    def corrupt(group: GlooGroup, data: torch.Tensor) -> object:
        data[-1] ^= 1
        return send(group, data)

    async with fetching(layout(), layout(), transport=Transport.GLOO, codec=KvCodec.INT8) as (prefill, receiver, _):
        with monkeypatch.context() as patch:
            patch.setattr(GlooGroup, "send", corrupt)
            with pytest.raises(TransferError):
                await fetch(prefill, receiver, [3, 4], [1, 2], 0)
        assert prefill.holder.acknowledged == []


async def test_a_codec_that_the_prefill_worker_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KvCodec, "format_name", property(lambda codec: f"{codec.value}/2"))
    link = KvSender.link

    async def of_an_older_version(sender: KvSender, offer: LinkOffer) -> LinkReply:
        monkeypatch.undo()
        return await link(sender, offer)

    monkeypatch.setattr(KvSender, "link", of_an_older_version)
    async with fetching(layout(), layout(), transport=Transport.GLOO, codec=KvCodec.FP8) as (prefill, receiver, _):
        with pytest.raises(IncompatiblePeerError, match="does not know the KV format 'fp8/2'"):
            await fetch(prefill, receiver, [3], [1], 0)
        assert receiver.links() == prefill.sender.links() == ()


async def test_a_prefill_worker_that_knows_no_codecs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    link = KvSender.link

    async def of_an_older_version(sender: KvSender, offer: LinkOffer) -> LinkReply:
        return await link(sender, LinkOffer(offer.instance_id, offer.fingerprint, offer.host, offer.transports))

    monkeypatch.setattr(KvSender, "link", of_an_older_version)
    async with fetching(layout(), layout(), transport=Transport.GLOO, codec=KvCodec.INT8) as (prefill, receiver, _):
        with pytest.raises(IncompatiblePeerError, match="does not know the KV format 'int8/1'"):
            await fetch(prefill, receiver, [3], [1], 0)
