"""The control protocol of a KV transfer, as values, and the interfaces of both sides.

`wire` sends these over gRPC; `kv_transfer` uses only the protocols at the end of this file.

    decode (KvReceiver)                          prefill (KvSender, KvHolder)
      | link(LinkOffer)                   ----->  |  once per peer: refuse other KV formats, agree on a transport
      |<- LinkReply                               |
      | rendezvous set/get (gloo, nccl)   <---->  |  the two ranks of a process group find each other
      | pull_computed(known)              ----->  |  large prompts: answered when more KV is computed than decode has
      |<- ComputedKv                              |
      | moves what is new, as below, and asks again, until the answer is the manifest; when decode has all KV by then,
      | that answer also acknowledges
      | pull(request_id, epoch)           ----->  |  other prompts: answered when that attempt's prefill is finished
      |<- Manifest                                |
      | shared memory: copies out of the mapped pool; else grant(Grant) and exactly the granted bytes arrive
      | acknowledge(request_id, epoch)    ----->  |  True: the lease was alive during the whole copy; blocks are freed
      |<- True                                    |
      commits
"""

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from tandem.core.errors import IncompatiblePeerError, StaleEpochError, TransferError, UnavailableError
from tandem.core.kv_frontier import KvFrontier, TransferChunk
from tandem.core.request import SampledToken

LAYOUTS_DIFFER = "the two workers' KV formats differ (model weights, dtype, or max_model_len with longrope factors)"


def unknown_format(kv_format: str) -> IncompatiblePeerError:
    """The error for a KV format that the prefill worker does not know."""
    return IncompatiblePeerError(
        f"the prefill worker does not know the KV format {kv_format!r}: use one version of tandem for both workers, or "
        "set kv_codec to none on decode workers"
    )


class PeerGoneError(UnavailableError):
    """The other side of a link cannot be reached. Other UnavailableErrors are errors that the peer returned."""


class NoLinkError(TransferError):
    """The peer answers, and no link for KV could be made with it in time: a network may carry the one and not the
    other."""


class Transport(StrEnum):
    """How KV bytes get from one instance to another."""

    SHARED_MEMORY = "shared_memory"  # one host: decode copies out of the prefill worker's mapped pool
    GLOO = "gloo"  # torch.distributed between CPUs
    NCCL = "nccl"  # torch.distributed between GPUs


def hash_token_ids(token_ids: Sequence[int]) -> str:
    """SHA-256 of the ids as 32-bit little-endian integers."""
    data = array("I", token_ids)
    assert data.itemsize == 4
    return hashlib.sha256(data.tobytes()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Manifest:
    """Describes the KV of one finished prefill, held under a lease until decode acknowledges the transfer.

    `block_ids` are blocks of the sender's pools, in order, of `block_size` tokens each; together they hold `num_tokens`
    tokens. `token_hash` is over exactly those tokens. `first_token` is the token sampled at the last position; its KV
    is not transferred. `allocation` is that of `KvFrontier`.
    """

    request_id: str
    epoch: int
    num_tokens: int
    token_hash: str
    block_ids: tuple[int, ...]
    fingerprint: str
    block_size: int
    first_token: SampledToken
    allocation: int = 0

    def check(self, *, request_id: str, epoch: int, token_ids: Sequence[int], fingerprint: str) -> None:
        """Refuse KV that is not the expected KV.

        Raises IncompatiblePeerError, StaleEpochError or TransferError.
        """
        if self.fingerprint != fingerprint:
            raise IncompatiblePeerError(LAYOUTS_DIFFER)
        if self.request_id != request_id or self.epoch != epoch:
            raise StaleEpochError("the manifest belongs to another attempt")
        if self.num_tokens != len(token_ids) or self.token_hash != hash_token_ids(token_ids):
            raise TransferError("the manifest describes the KV of other tokens")

    def frontier(self, num_layers: int) -> KvFrontier:
        """All blocks with all of the model's layers."""
        return KvFrontier.finished(self.allocation, len(self.block_ids), num_layers)


@dataclass(frozen=True, slots=True)
class ComputedKv:
    """Describes the KV of a prefill in progress. No lease protects it: it may be read, and counts only once a manifest
    of the same allocation says that it was there to the end.

    `block_ids` are those of the whole attempt, as in its manifest.
    """

    request_id: str
    epoch: int
    block_ids: tuple[int, ...]
    block_size: int
    frontier: KvFrontier

    @property
    def allocation(self) -> int:
        return self.frontier.allocation

    @property
    def is_complete(self) -> bool:
        """Nothing more will be known before the manifest."""
        return all(
            stage.next_blocks == len(self.block_ids) and stage.layers == stage.num_layers
            for stage in self.frontier.stages
        )


@dataclass(frozen=True, slots=True)
class HostIdentity:
    """Two processes with equal identities run under one kernel, in one network namespace, and as one user. `boot_id`
    names the first two."""

    boot_id: str
    uid: int


@dataclass(frozen=True, slots=True)
class LinkOffer:
    """Decode's side of a link: its instance, and the transports that it supports, best first. `kv_format` is how KV is
    to be coded on its way over a network (`KvCodec.format_name`); empty: not at all."""

    instance_id: str
    fingerprint: str
    host: HostIdentity
    transports: tuple[Transport, ...]
    kv_format: str = ""


@dataclass(frozen=True, slots=True)
class LinkReply:
    """Prefill's side. `link_id` is new for every link; a link that failed is never used again. Either side's death, or
    `unlink`, ends the link on the other side too.

    `num_blocks`, `block_size`, `tp` and `layers_per_stage` are those of the sender's `KvLayout`. `socket_name` (an
    abstract Unix socket) and `nonces` (one per rank, each valid once) lead to the descriptors of the ranks' pools when
    the transport is shared memory; they are empty otherwise. `kv_format` is the offer's, but empty over shared memory,
    where nothing is sent.
    """

    link_id: str
    instance_id: str
    fingerprint: str
    transport: Transport
    num_blocks: int
    block_size: int
    tp: int = 1
    layers_per_stage: tuple[int, ...] = ()
    socket_name: str = ""
    nonces: tuple[bytes, ...] = ()
    kv_format: str = ""


@dataclass(frozen=True, slots=True)
class Grant:
    """Permission to send what one rank of the sender holds of `part` (layers of the model) of an attempt's blocks:
    exactly `total_bytes`, in chunks that have up to `chunk_bytes` in memory.

    `allocation` is the one under which `part` was computed. `num_tokens` are all tokens of the attempt's blocks, which
    a link with a codec has to know. `sequence` counts the grants of a link from 0, without
    gaps. Over shared memory nothing is sent: the grant only asks for the checksum, and `sequence` is 0.
    """

    link_id: str
    request_id: str
    epoch: int
    sequence: int
    rank: int
    allocation: int
    part: TransferChunk
    total_bytes: int
    chunk_bytes: int
    checksum: bool
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class GrantReply:
    """The bytes that were sent, and their CRC-32 in the order sent (0 unless asked for). Over shared memory it is the
    CRC-32 of the bytes that would be sent, with zeros in the slots after the last token: decode need not have those."""

    sent_bytes: int
    checksum: int


class PeerControl(Protocol):
    """A prefill instance, as decode reaches it. Every coroutine raises a TandemError of the peer, PeerGoneError when
    the peer cannot be reached and DeadlineError when `timeout_s` has passed. A coroutine ends with
    `asyncio.CancelledError` only if its task was cancelled, and its call is then cancelled too."""

    @property
    def instance_id(self) -> str: ...

    @property
    def is_gone(self) -> bool:
        """True from the first PeerGoneError on."""
        ...

    async def link(self, offer: LinkOffer, timeout_s: float) -> LinkReply: ...

    def is_linked(self, link_id: str) -> bool:
        """False once either side has ended the link."""
        ...

    def when_unlinked(self, link_id: str, callback: Callable[[], None]) -> None:
        """Call `callback` once, on the event loop, when the link has ended or soon if it has ended already."""
        ...

    def unlink(self, link_id: str) -> None:
        """End the link; without effect when the link has ended. Never waits."""
        ...

    async def pull(self, request_id: str, epoch: int, timeout_s: float) -> Manifest: ...

    async def pull_computed(
        self, request_id: str, epoch: int, known: KvFrontier, min_new: int, has_all: bool, timeout_s: float
    ) -> ComputedKv | Manifest: ...

    async def grant(self, grant: Grant, timeout_s: float) -> GrantReply: ...

    async def acknowledge(self, request_id: str, epoch: int, timeout_s: float) -> bool: ...

    async def rendezvous_set(self, link_id: str, key: str, value: bytes, timeout_s: float) -> None: ...

    async def rendezvous_get(self, link_id: str, key: str, timeout_s: float) -> bytes: ...


class KvHolder(Protocol):
    """The prefill instance, which owns the blocks that wait to be fetched."""

    async def manifest(self, request_id: str, epoch: int, deadline_s: float) -> Manifest:
        """Wait until that attempt's prefill is finished and describe its KV, which is then under a lease.

        It may be called before the attempt is known, and again while the lease lives. `deadline_s` is on the
        process's monotonic clock. Raises DeadlineError, StaleEpochError for an attempt that was given up or
        whose lease has ended, or the attempt's own error.
        """
        ...

    async def computed(
        self, request_id: str, epoch: int, known: KvFrontier, min_new: int, has_all: bool, deadline_s: float
    ) -> ComputedKv | Manifest:
        """As `manifest`, but answered before the prefill is finished once `min_new` blocks of one layer are computed
        beyond `known`, or the last ones that will be. `known` counts as nothing when the attempt was given other blocks
        meanwhile. `has_all`: the reader has all KV of `known.allocation`. The manifest of that allocation is then
        acknowledged, too; StaleEpochError if the lease has ended."""
        ...

    def readable(self, request_id: str, epoch: int) -> ComputedKv | Manifest:
        """The part of that attempt's KV that is computed now. Raises StaleEpochError if there is none, or the attempt's
        own error."""
        ...

    async def acknowledge(self, request_id: str, epoch: int) -> bool:
        """End the lease and free the blocks. False if the lease had ended already or the epoch is not current:
        the copy that decode made may then be torn."""
        ...


class KvLinkServer(Protocol):
    """The prefill side of the links (`kv_transfer.sender.KvSender`)."""

    async def link(self, offer: LinkOffer) -> LinkReply: ...

    async def ended(self, link_id: str) -> None:
        """Return when the link has ended on this side."""
        ...

    def unlink(self, link_id: str) -> None: ...

    async def send(self, grant: Grant, kv: ComputedKv | Manifest) -> GrantReply: ...

    async def rendezvous_set(self, link_id: str, key: str, value: bytes) -> None: ...

    async def rendezvous_get(self, link_id: str, key: str, timeout_s: float) -> bytes: ...
