"""Lets the holders of API keys use the public APIs, each within the limits of its key."""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from tandem.core.access import Caller
from tandem.core.api_keys import ApiKey, ApiKeyFile, digest_of
from tandem.core.clock import Clock
from tandem.core.config_file import load_config, parse_config
from tandem.core.errors import OverloadedError, TandemError, UnauthenticatedError
from tandem.core.file_watch import FileWatch
from tandem.core.secret_source import file_of, read_secret

_LOG = logging.getLogger(__name__)

_SCHEME = "bearer"
KEY_REQUESTS, KEY_RATE = "key-requests", "key-rate"
REASONS = (KEY_REQUESTS, KEY_RATE)


def load_keys(source: str) -> tuple[ApiKey, ...]:
    """The keys of `router.api_keys`. Raises ConfigError."""
    path = file_of(source)
    if path is not None:
        return load_config(path, ApiKeyFile).keys
    return parse_config(read_secret(source), source, Path(), ApiKeyFile).keys


@dataclass(slots=True)
class KeyRateLimit:
    """At most `burst` at once, and `per_s` on average: a virtual schedule, as ATM's generic cell rate algorithm
    (ITU-T I.371). `due_s` is when the next request would come if all came evenly."""

    per_s: float
    burst: int
    due_s: float = -math.inf

    def wait_s(self, now_s: float) -> float:
        """0: the request is counted. Else it is not, and may come after that time."""
        due_s = max(self.due_s, now_s)
        wait_s = due_s - (self.burst - 1) / self.per_s - now_s
        if wait_s > 0.0:
            return wait_s
        self.due_s = due_s + 1.0 / self.per_s
        return 0.0


@dataclass(slots=True)
class _KeyUse:
    """The counts of one key. They stay when the file, and with it `key`, changes."""

    key: ApiKey
    num_requests: int = 0  # in progress
    rate: KeyRateLimit | None = None
    refused: Counter[str] = field(default_factory=Counter)  # by reason

    def change(self, key: ApiKey) -> None:
        if self.rate is None or (key.requests_per_s, key.burst) != (self.rate.per_s, self.rate.burst):
            self.rate = None if key.requests_per_s is None else KeyRateLimit(key.requests_per_s, key.burst)
        self.key = key


class ApiKeyAccess:
    """An `AccessControl` by keys. Used on one event loop."""

    def __init__(
        self,
        keys: Sequence[ApiKey],
        clock: Clock,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`wall_clock`: seconds since 1970, for the expiry of keys."""
        self._clock = clock
        self._wall_clock = wall_clock
        self._by_digest: dict[str, str] = {}  # names
        self._uses: dict[str, _KeyUse] = {}
        self.tenants: frozenset[str] = frozenset()
        self.replace(keys)

    def replace(self, keys: Sequence[ApiKey]) -> None:
        """From now on these keys count. Requests of others that run go on."""
        uses: dict[str, _KeyUse] = {}
        for key in keys:
            uses[key.name] = self._uses.get(key.name) or _KeyUse(key)
            uses[key.name].change(key)
        self._uses = uses
        self._by_digest = {key.sha256: key.name for key in keys}
        self.tenants = frozenset(key.tenant for key in keys)

    def refusals(self) -> Counter[tuple[str, str]]:
        """Requests refused so far, by tenant and reason."""
        total: Counter[tuple[str, str]] = Counter()
        for use in self._uses.values():
            for reason in REASONS:
                total[use.key.tenant, reason] += use.refused[reason]
        return total

    def authenticate(self, authorization: str, address: str) -> Caller:
        scheme, _, secret = authorization.strip().partition(" ")
        if scheme.lower() != _SCHEME or not secret.strip():
            raise UnauthenticatedError("This server needs an API key, in the header 'Authorization: Bearer KEY'.")
        # A look-up by hash tells by its time at most something about hashes, which lead to no key.
        use = self._uses.get(self._by_digest.get(digest_of(secret.strip()), ""))
        if use is None:
            raise UnauthenticatedError("This server does not know the API key.")
        if use.key.is_expired(datetime.fromtimestamp(self._wall_clock(), UTC)):
            raise UnauthenticatedError(f"The API key '{use.key.name}' has expired.")
        return Caller(f"key {use.key.name}", use.key.tenant, use.key.name, use.key.names_tenants)

    @contextmanager
    def admit(self, caller: Caller) -> Iterator[None]:
        use = self._uses.get(caller.key)
        if use is None:  # the key was removed a moment ago
            raise UnauthenticatedError("This server does not know the API key.")
        if use.key.max_requests is not None and use.num_requests >= use.key.max_requests:
            use.refused[KEY_REQUESTS] += 1
            raise OverloadedError(
                f"The API key '{caller.key}' has {use.num_requests} requests in progress, as many as it may have.",
                reason=KEY_REQUESTS,
            )
        if use.rate is not None and (wait_s := use.rate.wait_s(self._clock.now_s())) > 0.0:
            use.refused[KEY_RATE] += 1
            raise OverloadedError(
                f"The API key '{caller.key}' may send {use.rate.per_s:g} requests per second; "
                f"try again in {wait_s:.3g} s.",
                retry_after_s=wait_s,
                reason=KEY_RATE,
            )
        use.num_requests += 1
        try:
            yield
        finally:
            use.num_requests -= 1

    async def reload_when_changed(self, source: str) -> None:
        """Until cancelled: changes of the file of `source` count within seconds. Keys that cannot be read change
        nothing, and the log says so."""
        path = file_of(source)
        assert path is not None, "only a file changes"
        watch = FileWatch((path,))
        while True:
            try:
                self.replace(await asyncio.to_thread(load_keys, source))
                _LOG.info("%d API keys of %d tenants are in force", len(self._uses), len(self.tenants))
            except TandemError as error:
                _LOG.error("the API keys stay as they were: %s", error.message)
            await watch.wait_for_change()
