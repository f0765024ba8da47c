"""Which instances take more requests of this router now, so that requests do not wait where nobody can order them.

`RoutingSettings` says when an instance is without credit. For pairs, decode instances must also have room for what is
expected of the requests whose decode instance is not selected yet.
"""

from collections import Counter
from collections.abc import Container

from tandem.core.session import Role
from tandem.scheduling.known_instance import KnownInstance
from tandem.scheduling.routing_settings import RoutingSettings

# Where a request decodes, prompts of no more than this part of the memory wait for it: more would only wait there.
WAITING_MEMORY_SHARE = 4
# What requests are expected to grow to, as a multiple of the memory where they decode. Most of the time they are
# shorter, for they grow at different times; and some of the memory's worth is on its way.
EXPECTED_MEMORY_RATIO = 1.5


class InstanceCredit:
    """`without`: ids of the instances without credit, to be read only. Without a limit in the settings, all have it."""

    __slots__ = ("_max_steps", "_max_tokens", "_room", "_shares", "_unplaced", "without")

    def __init__(self, settings: RoutingSettings) -> None:
        self.without: set[str] = set()
        self._max_tokens = settings.max_outstanding_tokens
        self._max_steps = settings.outstanding_steps
        # Tokens, by the fingerprint of the KV: what decode instances with credit have room for, and what is expected of
        # requests whose decode instance is not selected yet. Beside them the share of each instance.
        self._room: Counter[str] = Counter()
        self._unplaced: Counter[str] = Counter()
        self._shares: dict[str, tuple[Counter[str], str, int]] = {}

    @property
    def is_limited(self) -> bool:
        return self._max_tokens is not None

    def update(self, instance: KnownInstance) -> None:
        """The load of the instance has changed, or its report."""
        limit = self._max_tokens
        if limit is None:
            return
        room_tokens = 1
        role, step_tokens = instance.role, instance.status.step_prompt_tokens
        computes_enough = 0 < self._max_steps * step_tokens <= instance.uncomputed_tokens
        if role is not Role.PREFILL:
            limit = min(limit, instance.memory_tokens // WAITING_MEMORY_SHARE)
            room_tokens = int(EXPECTED_MEMORY_RATIO * instance.memory_tokens) - instance.expected_tokens
        has_credit = instance.waiting_tokens < limit and room_tokens > 0 and not computes_enough
        (self.without.discard if has_credit else self.without.add)(instance.instance_id)
        if role is Role.PREFILL:
            self._set_share(instance, self._unplaced, instance.expected_tokens)
        elif role is Role.DECODE:
            self._set_share(instance, self._room, room_tokens if has_credit and instance.is_usable else 0)

    def leave_role(self, instance_id: str) -> None:
        """It counts in its present role no more."""
        if (share := self._shares.pop(instance_id, None)) is not None:
            of, fingerprint, num_tokens = share
            of[fingerprint] -= num_tokens
            if not of[fingerprint]:  # each plan epoch has fingerprints of its own
                del of[fingerprint]

    def remove(self, instance_id: str) -> None:
        """It is gone for good."""
        self.leave_role(instance_id)
        self.without.discard(instance_id)

    def with_room(self, fingerprints: Container[str]) -> Container[str]:
        """Those of `fingerprints` whose decode instances have room for another request."""
        if self._max_tokens is None:
            return fingerprints
        unplaced = self._unplaced
        return [each for each, room in self._room.items() if room > unplaced[each] and each in fingerprints]

    def check_integrity(self) -> None:
        """Assert that the sums are those of the shares, O(instances)."""
        for totals in (self._room, self._unplaced):
            assert totals.total() == sum(tokens for of, _, tokens in self._shares.values() if of is totals)

    def _set_share(self, instance: KnownInstance, of: Counter[str], num_tokens: int) -> None:
        self.leave_role(instance.instance_id)
        fingerprint = instance.status.fingerprint
        of[fingerprint] += num_tokens
        self._shares[instance.instance_id] = (of, fingerprint, num_tokens)
