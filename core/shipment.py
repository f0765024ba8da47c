"""What travels with a KV shipment, so that decode can refuse anything incomplete, outdated or not meant for it."""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from tandem.core.errors import IncompatiblePeerError, StaleEpochError, TransferError
from tandem.core.request import SampledToken


def hash_token_ids(token_ids: Sequence[int]) -> str:
    """SHA-256 of the ids as 32-bit little-endian integers."""
    data = array("I", token_ids)
    assert data.itemsize == 4
    return hashlib.sha256(data.tobytes()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Manifest:
    """Describes the KV of one finished prefill, held under a lease until decode acknowledges it.

    `block_ids` are blocks of the sender's pool, in order; together they hold `num_tokens` tokens. `token_hash` is
    over exactly those tokens. `first_token` is the token drawn from the last position; its KV is not in the shipment.
    """

    request_id: str
    epoch: int
    num_tokens: int
    token_hash: str
    block_ids: tuple[int, ...]
    fingerprint: str
    bytes_per_layer: int
    first_token: SampledToken

    def check(self, *, request_id: str, epoch: int, token_ids: Sequence[int], fingerprint: str) -> None:
        """Refuse a shipment that is not the one expected.

        Raises IncompatiblePeerError, StaleEpochError or TransferError.
        """
        if self.fingerprint != fingerprint:
            raise IncompatiblePeerError("the two workers' KV layouts differ (model weights, dtype or block size)")
        if self.request_id != request_id or self.epoch != epoch:
            raise StaleEpochError("the shipment belongs to another attempt")
        if self.num_tokens != len(token_ids) or self.token_hash != hash_token_ids(token_ids):
            raise TransferError("the shipment holds the KV of other tokens")
