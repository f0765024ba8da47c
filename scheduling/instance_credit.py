"""Which instances take more requests of this router now: the others wait in the router, where they can be ordered.

`RoutingSettings` says when an instance has no credit. A pair also needs a decode instance with memory for the expected
tokens of all requests whose decode instance is not selected yet.
"""

from collections import Counter
from collections.abc import Container

from tandem.core.session import Role
from tandem.scheduling.known_instance import KnownInstance
from tandem.scheduling.routing_settings import RoutingSettings

# Prompts that wait on an instance that decodes take at most one part in this many of its memory: more would only wait.
WAITING_MEMORY_DIVISOR = 4
# Expected tokens may be this multiple of an instance's memory. The expectation is for the end of each answer, and
# answers grow at different times, so that most requests are shorter at any moment.
EXPECTED_MEMORY_RATIO = 1.5


class InstanceCredit:
    """`without` are the ids of the instances without credit, to be read only. Without `max_outstanding_tokens` in the
    settings all instances have credit."""

    __slots__ = ("_free", "_max_steps", "_max_tokens", "_shares", "_unplaced", "without")

    def __init__(self, settings: RoutingSettings) -> None:
        self.without: set[str] = set()
        self._max_tokens = settings.max_outstanding_tokens
        self._max_steps = settings.outstanding_steps
        # Sums in tokens, by the fingerprint of the KV: memory that decode instances with credit have left, and expected
        # tokens of requests whose decode instance is not selected yet. `_shares` has each instance's summand: the sum
        # that it is part of, its fingerprint and the tokens.
        self._free: Counter[str] = Counter()
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
        free_tokens = 1
        role, step_tokens = instance.role, instance.status.step_prompt_tokens
        computes_enough = 0 < self._max_steps * step_tokens <= instance.uncomputed_tokens
        if role is not Role.PREFILL:
            limit = min(limit, instance.memory_tokens // WAITING_MEMORY_DIVISOR)
            free_tokens = int(EXPECTED_MEMORY_RATIO * instance.memory_tokens) - instance.expected_tokens
        has_credit = instance.waiting_tokens < limit and free_tokens > 0 and not computes_enough
        (self.without.discard if has_credit else self.without.add)(instance.instance_id)
        if role is Role.PREFILL:
            self._set_share(instance, self._unplaced, instance.expected_tokens)
        elif role is Role.DECODE:
            self._set_share(instance, self._free, free_tokens if has_credit and instance.is_usable else 0)

    def leave_role(self, instance_id: str) -> None:
        """The instance no longer counts in its present role."""
        if (share := self._shares.pop(instance_id, None)) is not None:
            total, fingerprint, num_tokens = share
            total[fingerprint] -= num_tokens
            if not total[fingerprint]:  # plan epochs have fingerprints of their own, which would pile up
                del total[fingerprint]

    def remove(self, instance_id: str) -> None:
        """The instance is gone."""
        self.leave_role(instance_id)
        self.without.discard(instance_id)

    def with_memory(self, fingerprints: Container[str]) -> Container[str]:
        """The `fingerprints` whose decode instances have memory for another request."""
        if self._max_tokens is None:
            return fingerprints
        unplaced = self._unplaced
        return [each for each, free in self._free.items() if free > unplaced[each] and each in fingerprints]

    def check_integrity(self) -> None:
        """Assert that the sums are those of the shares, O(instances)."""
        for total in (self._free, self._unplaced):
            assert total.total() == sum(tokens for part_of, _, tokens in self._shares.values() if part_of is total)

    def _set_share(self, instance: KnownInstance, total: Counter[str], num_tokens: int) -> None:
        self.leave_role(instance.instance_id)
        fingerprint = instance.status.fingerprint
        total[fingerprint] += num_tokens
        self._shares[instance.instance_id] = (total, fingerprint, num_tokens)
