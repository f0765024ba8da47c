"""Converts sequences and chunks into the values that engine, readers and routers get. Pure."""

from tandem.core.attempt_id import AttemptId
from tandem.core.kv_layout import KvLayout
from tandem.core.request import SampledToken
from tandem.core.session import KvSource, TransferCommitted
from tandem.core.transfer import Manifest, hash_token_ids
from tandem.decode_worker.fetcher import Fetch, KvArrived
from tandem.engine.step import SampleRequest, SequenceSlice
from tandem.prefill_worker.held_kv import KvComputing
from tandem.scheduling.chunk import Chunk
from tandem.scheduling.sequence import Sequence


def attempt_of(sequence: Sequence) -> AttemptId:
    assert isinstance(sequence.key, AttemptId), "an instance names its sequences by attempt"
    return sequence.key


def slice_of(chunk: Chunk) -> SequenceSlice:
    """The chunk as input of the engine."""
    sequence = chunk.sequence
    request, tokens = sequence.request, sequence.token_ids
    end = chunk.start + chunk.num_tokens
    sample, wanted = None, None
    if chunk.samples:
        sample = SampleRequest(request.sampling, len(tokens), tokens, request.num_prompt_tokens)
    if chunk.is_prompt and not sequence.has_first_token:
        wanted = request.sampling.prompt_logprobs
    return SequenceSlice(
        token_ids=tokens[chunk.start : end],
        start=chunk.start,
        block_table=sequence.block_table,
        sample=sample,
        prompt_logprobs=wanted,
        next_token_id=tokens[end] if wanted is not None and end < len(tokens) else None,
    )


def kv_computing(chunk: Chunk, layout: KvLayout, step: int) -> KvComputing:
    """The KV that readers may fetch before and during the step with that number."""
    sequence = chunk.sequence
    end = chunk.start + chunk.num_tokens
    num_blocks = layout.blocks_for(sequence.num_tokens)
    return KvComputing(
        attempt_id=attempt_of(sequence),
        block_ids=tuple(sequence.block_table[:num_blocks]),
        block_size=layout.block_size,
        is_first=chunk.start == sequence.num_cached,
        blocks=chunk.start // layout.block_size,
        next_blocks=num_blocks if chunk.samples else end // layout.block_size,
        step=step,
        layers_per_stage=layout.layers_per_stage or (layout.num_layers,),
    )


def manifest_of(sequence: Sequence, first_token: SampledToken, layout: KvLayout) -> Manifest:
    """Describes the KV of a computed prompt. `first_token` was sampled from it, and is not in `token_ids` yet."""
    num_blocks = layout.blocks_for(sequence.num_tokens)
    return Manifest(
        request_id=sequence.request.request_id,
        epoch=sequence.request.epoch,
        num_tokens=sequence.num_tokens,
        token_hash=hash_token_ids(sequence.token_ids),
        block_ids=tuple(sequence.block_table[:num_blocks]),
        fingerprint=layout.fingerprint,
        block_size=layout.block_size,
        first_token=first_token,
    )


def fetch_of(sequence: Sequence, source: KvSource) -> Fetch:
    """The transfer into the blocks that are reserved for the sequence."""
    request = sequence.request
    return Fetch(
        attempt_id=attempt_of(sequence),
        request_id=request.request_id,
        epoch=request.epoch,
        token_ids=request.token_ids,
        source=source,
        block_ids=tuple(sequence.block_table),
        deadline_s=request.deadline_s,
    )


def committed_event(arrived: KvArrived) -> TransferCommitted:
    return TransferCommitted(
        handle=arrived.attempt_id.handle,
        transfer_s=arrived.transfer_s,
        transfer_bytes=arrived.transfer_bytes,
        transport=arrived.transport.value,
        streamed_bytes=arrived.streamed_bytes,
        streamed_s=arrived.streamed_s,
    )
