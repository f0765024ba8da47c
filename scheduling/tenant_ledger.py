"""What each tenant has been given: the counters of fair queueing.

The virtual token counter (VTC) of Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024: a tenant is
charged for the prompt tokens that are computed for it and, twice as much, for its output tokens; the tenant with the
smallest counter is next. One that begins to wait is lifted to the smallest counter of those that wait, so that it does
not make up for its absence. Tokens of a prompt that were in a prefix cache are not charged.
"""

OUTPUT_WEIGHT = 2
"""An output token costs as much as two prompt tokens, as in the paper."""


class TenantLedger:
    """Counters of the tenants that have requests in the router, so there are no more of them than requests."""

    def __init__(self) -> None:
        self._tokens: dict[str, float] = {}
        self._num_open: dict[str, int] = {}
        self._level = 0.0  # of the tenant served last

    def open(self, tenant: str) -> None:
        """One more request of it is in the router."""
        self._num_open[tenant] = self._num_open.get(tenant, 0) + 1
        self._tokens.setdefault(tenant, 0.0)

    def close(self, tenant: str) -> None:
        """One of its requests has ended."""
        self._num_open[tenant] -= 1
        if not self._num_open[tenant]:
            del self._num_open[tenant], self._tokens[tenant]

    def given(self, tenant: str) -> float:
        """Weighted tokens. The tenant has requests in the router."""
        return self._tokens[tenant]

    def wait(self, tenant: str, least_waiting: float | None) -> None:
        """It begins to wait; `least_waiting`: the smallest counter of those that wait already, None without any."""
        floor = self._level if least_waiting is None else least_waiting
        self._tokens[tenant] = max(self._tokens[tenant], floor)

    def dispatched(self, tenant: str, num_tokens: int) -> None:
        """A prompt of it is to be computed."""
        self._level = self._tokens[tenant]
        self._tokens[tenant] += num_tokens

    def found_cached(self, tenant: str, num_tokens: int) -> None:
        """That many tokens of a dispatched prompt need not be computed."""
        if tenant in self._tokens:
            self._tokens[tenant] -= num_tokens

    def generated(self, tenant: str, num_tokens: int) -> None:
        if tenant in self._tokens:
            self._tokens[tenant] += OUTPUT_WEIGHT * num_tokens
