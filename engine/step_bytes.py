"""The bytes of a step, by which rank 0 of an instance tells the other ranks what to compute.

Little-endian; one message, whose length the channel knows:

    "TSTP"  version u16  reserved u16  step u64  slices u32  token ids u32  blocks u32
    start      i32 [slices]       first position
    tokens     u32 [slices]       number of token ids
    blocks     u32 [slices]       length of the block table
    flags      u8  [slices]       1: a token is drawn; 2: log-probabilities are wanted; 4: the next token is known
    token_ids  i32 [token ids]    of all slices
    block_ids  i32 [blocks]       of all slices
    CRC-32 of everything before   u32

Sampling parameters are not included: rank 0 samples.
"""

import struct
import zlib
from collections.abc import Sequence
from itertools import chain

import numpy as np

from tandem.core.errors import InternalError
from tandem.core.request import SamplingParams
from tandem.engine.step import SampleRequest, SequenceSlice

_MAGIC = b"TSTP"
_VERSION = 1
_HEADER = struct.Struct("<4sHHQIII")
_CHECKSUM = struct.Struct("<I")
_SLICE_BYTES = 3 * 4 + 1
_DRAWS, _SCORED, _NEXT_KNOWN = 1, 2, 4


def encode_step(number: int, slices: Sequence[SequenceSlice]) -> bytes:
    """Everything of each slice except sampling parameters, histories and numbers of log-probabilities."""
    lengths = np.array([len(part.token_ids) for part in slices], "<u4")
    blocks = np.array([len(part.block_table) for part in slices], "<u4")
    num_tokens, num_blocks = int(lengths.sum()), int(blocks.sum())
    flags = [
        _DRAWS * (part.sample is not None)
        | _SCORED * (part.prompt_logprobs is not None)
        | _NEXT_KNOWN * (part.next_token_id is not None)
        for part in slices
    ]
    data = b"".join(
        (
            _HEADER.pack(_MAGIC, _VERSION, 0, number, len(slices), num_tokens, num_blocks),
            np.array([part.start for part in slices], "<i4").tobytes(),
            lengths.tobytes(),
            blocks.tobytes(),
            bytes(flags),
            np.fromiter(chain.from_iterable(part.token_ids for part in slices), "<i4", num_tokens).tobytes(),
            np.fromiter(chain.from_iterable(part.block_table for part in slices), "<i4", num_blocks).tobytes(),
        )
    )
    return data + _CHECKSUM.pack(zlib.crc32(data))


def decode_step(data: bytes) -> tuple[int, list[SequenceSlice]]:
    """Step number and slices. Raises InternalError for bytes that are not a complete, undamaged step."""
    if len(data) < _HEADER.size + _CHECKSUM.size:
        raise InternalError(f"A step of {len(data)} bytes is too short")
    if _CHECKSUM.unpack(data[-_CHECKSUM.size :])[0] != zlib.crc32(memoryview(data)[: -_CHECKSUM.size]):
        raise InternalError("A step's checksum is wrong")
    magic, version, _, number, count, num_tokens, num_blocks = _HEADER.unpack_from(data)
    if (magic, version) != (_MAGIC, _VERSION):
        raise InternalError(f"A step has the format {magic!r} {version}, not {_MAGIC!r} {_VERSION}")
    if len(data) != _HEADER.size + count * _SLICE_BYTES + 4 * (num_tokens + num_blocks) + _CHECKSUM.size:
        raise InternalError("A step's length does not fit its header")
    at = _HEADER.size
    starts, lengths, blocks = (np.frombuffer(data, "<i4", count, at + 4 * count * index).tolist() for index in range(3))
    at += 3 * 4 * count
    flags = data[at : at + count]
    token_ids = np.frombuffer(data, "<i4", num_tokens, at + count).tolist()
    block_ids = np.frombuffer(data, "<i4", num_blocks, at + count + 4 * num_tokens).tolist()
    if min(lengths + blocks, default=0) < 0 or (sum(lengths), sum(blocks)) != (num_tokens, num_blocks):
        raise InternalError("The slices of a step do not fit its header")
    slices = []
    token, block = 0, 0
    for start, length, num_of_table, flag in zip(starts, lengths, blocks, flags, strict=True):
        slices.append(
            SequenceSlice(
                token_ids=token_ids[token : token + length],
                start=start,
                block_table=block_ids[block : block + num_of_table],
                sample=SampleRequest(SamplingParams(), start + length, (), 0) if flag & _DRAWS else None,
                prompt_logprobs=0 if flag & _SCORED else None,
                next_token_id=0 if flag & _NEXT_KNOWN else None,
            )
        )
        token, block = token + length, block + num_of_table
    return number, slices
