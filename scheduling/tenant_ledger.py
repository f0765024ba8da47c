"""The counters of fair queueing: how many tokens each tenant was served.

The virtual token counter (VTC) of Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024: a tenant is
charged for its computed prompt tokens and, twice as much, for its output tokens. The tenant with the smallest counter
is next. The counter of a tenant that begins to wait is raised to the smallest counter of the waiting tenants, so that
absence earns no credit. Prompt tokens from a prefix cache are not charged.
"""

OUTPUT_WEIGHT = 2
"""An output token costs as much as two prompt tokens, as in the paper."""


class TenantLedger:
    """One counter for each tenant with requests in the router. A tenant without requests has no counter."""

    def __init__(self) -> None:
        self._tokens: dict[str, float] = {}
        self._num_open: dict[str, int] = {}
        self._last_served = 0.0  # counter of the tenant that was dispatched last, before it was charged

    def open(self, tenant: str) -> None:
        """A request of the tenant has entered the router."""
        self._num_open[tenant] = self._num_open.get(tenant, 0) + 1
        self._tokens.setdefault(tenant, 0.0)

    def close(self, tenant: str) -> None:
        """A request of the tenant has left the router."""
        self._num_open[tenant] -= 1
        if not self._num_open[tenant]:
            del self._num_open[tenant], self._tokens[tenant]

    def given(self, tenant: str) -> float:
        """Weighted tokens that the tenant was served. The tenant has requests in the router."""
        return self._tokens[tenant]

    def wait(self, tenant: str, least_waiting: float | None) -> None:
        """The tenant begins to wait. `least_waiting`: the smallest counter of the waiting tenants; None without any."""
        floor = self._last_served if least_waiting is None else least_waiting
        self._tokens[tenant] = max(self._tokens[tenant], floor)

    def dispatched(self, tenant: str, num_tokens: int) -> None:
        """A prompt of the tenant was dispatched."""
        self._last_served = self._tokens[tenant]
        self._tokens[tenant] += num_tokens

    def found_cached(self, tenant: str, num_tokens: int) -> None:
        """`num_tokens` tokens of a dispatched prompt were in a prefix cache."""
        if tenant in self._tokens:
            self._tokens[tenant] -= num_tokens

    def generated(self, tenant: str, num_tokens: int) -> None:
        """Output tokens of the tenant have arrived."""
        if tenant in self._tokens:
            self._tokens[tenant] += OUTPUT_WEIGHT * num_tokens
