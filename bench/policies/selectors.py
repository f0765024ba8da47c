"""Routing policies to compare with, and a router that hears late of what happens at the instances."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from random import Random
from typing import Any

from tandem.core.session import Role
from tandem.scheduling.instance_selector import InstanceSelector, Place
from tandem.scheduling.known_instance import KnownInstance
from tandem.scheduling.routed_request import Attempt, RoutedRequest
from tandem.scheduling.routing_settings import RoutingSettings


class SimpleSelector(InstanceSelector):
    """A rule that looks at usable instances only: for prompts prefill instances (colocated ones if there are none),
    then decode instances."""

    def __init__(self, settings: RoutingSettings, **options: Any) -> None:
        super().__init__(settings, **options)
        self._turn = count()
        self._random = Random(0)
        self._open_requests: dict[str, int] = {}  # as last heard

    def put(self, instance: KnownInstance, *, is_chosen: bool = False) -> None:
        super().put(instance, is_chosen=is_chosen)
        self._open_requests[instance.instance_id] = instance.open_requests

    def _load(self, instance: KnownInstance) -> int:
        return self._open_requests[instance.instance_id]

    def _pick(self, instances: list[KnownInstance], request: RoutedRequest) -> KnownInstance:
        raise NotImplementedError

    def _choose(
        self, request: RoutedRequest, needed_tokens: int, failures: Mapping[str, float], now_s: float
    ) -> Place | None:
        for role in (Role.PREFILL, Role.COLOCATED):
            if usable := self._usable(role):
                return Place(self._pick(usable, request), role is Role.PREFILL, None)
        return None

    def choose_decode(self, attempt: Attempt, prefill: KnownInstance, now_s: float) -> Place | None:
        usable = self._usable(Role.DECODE)
        return Place(self._pick(usable, attempt.request), False, None) if usable else None

    def _usable(self, role: Role) -> list[KnownInstance]:
        return [each for each in self.instances.values() if each.role is role and each.is_usable]


class RoundRobin(SimpleSelector):
    def _pick(self, instances: list[KnownInstance], request: RoutedRequest) -> KnownInstance:
        return instances[next(self._turn) // 2 % len(instances)]  # a request asks twice


class LeastLoaded(SimpleSelector):
    """Fewest requests."""

    def _pick(self, instances: list[KnownInstance], request: RoutedRequest) -> KnownInstance:
        return min(instances, key=self._load)


class PowerOfTwo(SimpleSelector):
    """The one with fewer requests of two at random."""

    def _pick(self, instances: list[KnownInstance], request: RoutedRequest) -> KnownInstance:
        two = [self._random.choice(instances) for _ in range(2)]
        return min(two, key=self._load)


class PrefixAffine(SimpleSelector):
    """The same first block, the same instance; without a shared prefix as `LeastLoaded`."""

    def _pick(self, instances: list[KnownInstance], request: RoutedRequest) -> KnownInstance:
        names = request.block_names(instances[0].status.block_size)
        if names and instances[0].role is not Role.DECODE:
            return instances[hash(names[0]) % len(instances)]
        return min(instances, key=self._load)


def with_timing(selector_type: type[InstanceSelector], seconds: list[float]) -> type[InstanceSelector]:
    """The same policy, which appends the time of each of its choices to `seconds`."""

    class Timed(selector_type):  # type: ignore[misc, valid-type]
        def choose_first(self, request: RoutedRequest, now_s: float) -> Place | None:
            began_s = time.perf_counter()
            try:
                return super().choose_first(request, now_s)  # type: ignore[no-any-return]
            finally:
                seconds.append(time.perf_counter() - began_s)

        def choose_decode(self, attempt: Attempt, prefill: KnownInstance, now_s: float) -> Place | None:
            began_s = time.perf_counter()
            try:
                return super().choose_decode(attempt, prefill, now_s)  # type: ignore[no-any-return]
            finally:
                seconds.append(time.perf_counter() - began_s)

    return Timed


def with_stale_reports(selector_type: type[InstanceSelector], period_s: float) -> type[InstanceSelector]:
    """The same policy, which hears only every `period_s` of what has happened to attempts. It knows its own dispatches
    at once."""

    class Stale(selector_type):  # type: ignore[misc, valid-type]
        def __init__(self, settings: RoutingSettings, **options: Any) -> None:
            super().__init__(settings, **options)
            self._changed: dict[str, KnownInstance] = {}
            self._late: list[Callable[[], None]] = []
            self._next_s = 0.0

        def choose_first(self, request: RoutedRequest, now_s: float) -> Place | None:
            self._hear(now_s)
            return super().choose_first(request, now_s)  # type: ignore[no-any-return]

        def choose_decode(self, attempt: Attempt, prefill: KnownInstance, now_s: float) -> Place | None:
            self._hear(now_s)
            return super().choose_decode(attempt, prefill, now_s)  # type: ignore[no-any-return]

        def put(self, instance: KnownInstance, *, is_chosen: bool = False) -> None:
            if is_chosen or instance.instance_id not in self._known():
                super().put(instance, is_chosen=is_chosen)
            else:
                self._changed[instance.instance_id] = instance

        def first_token(self, attempt: Attempt, now_s: float) -> None:
            self._late.append(partial(super().first_token, attempt, now_s))

        def transferred(self, attempt: Attempt, now_s: float) -> None:
            self._late.append(partial(super().transferred, attempt, now_s))

        def finished(self, attempt: Attempt, now_s: float) -> None:
            self._late.append(partial(super().finished, attempt, now_s))

        def released(self, attempt: Attempt, instance_id: str, now_s: float) -> None:
            self._late.append(partial(super().released, attempt, instance_id, now_s))

        def _known(self) -> set[str]:
            return {*self._prefills.views, *self._decodes.views, *self._colocated.views}

        def _hear(self, now_s: float) -> None:
            if now_s < self._next_s:
                return
            self._next_s = now_s - now_s % period_s + period_s
            late, self._late = self._late, []
            for tell in late:
                tell()
            changed, self._changed = self._changed, {}
            for instance in changed.values():
                super().put(instance)

    return Stale
