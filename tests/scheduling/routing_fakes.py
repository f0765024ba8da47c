"""A driver that writes down what the routing machine decides, and instances that a test speaks for."""

from dataclasses import dataclass, field, replace

import tests.instance_status
from tandem.core.errors import TandemError
from tandem.core.request_slo import NO_SLO, RequestSlo
from tandem.core.session import InstanceStatus
from tandem.core.step_coefficients import StepCoefficients
from tandem.scheduling.routed_request import Attempt, RoutedRequest
from tandem.scheduling.routing import Selection
from tandem.scheduling.routing_machine import RoutingMachine
from tandem.scheduling.routing_settings import RoutingSettings
from tests.instance_status import ROLES

STEP_COST = StepCoefficients(0.01, 1e-4, 1e-4, 1e-4, 1e-6, 0.0)


def make_status(instance_id: str, **changes: object) -> InstanceStatus:
    """Names begin with the first letter of the role."""
    return replace(tests.instance_status.make_status(instance_id, ROLES[instance_id[0]]), **changes)  # type: ignore[arg-type]


def numbered_request(
    number: int, *, num_prompt_tokens: int, client: str = "", slo: RequestSlo = NO_SLO, received_s: float = 0.0
) -> RoutedRequest:
    """The request that a routing machine accepted as its `number`-th."""
    request = RoutedRequest(
        number, num_prompt_tokens=num_prompt_tokens, max_tokens=5, received_s=received_s, client=client, slo=slo
    )
    request.number = number
    return request


@dataclass
class Sent:
    """One `submit` to an instance."""

    attempt: Attempt
    instance_id: str
    source_id: str | None
    selection: Selection | None


@dataclass
class DrivenRouter:
    """The machine with its driver. `now_s` is moved by the test. `there`: the handles that instances know, and so what
    they hold blocks for, unless the test says that an instance has ended one by itself."""

    settings: RoutingSettings = field(default_factory=RoutingSettings)
    now_s: float = 0.0
    sent: list[Sent] = field(default_factory=list)
    cancelled: list[tuple[int, str]] = field(default_factory=list)
    renewed: list[tuple[int, str, float]] = field(default_factory=list)  # handle, instance, when
    there: set[tuple[int, str]] = field(default_factory=set)  # handle, instance
    ends: dict[object, TandemError | None] = field(default_factory=dict)
    wake_s: float = float("inf")

    def __post_init__(self) -> None:
        self.machine = RoutingMachine(self, self.settings)

    def submit(self, attempt: Attempt, instance_id: str, source_id: str | None, selection: Selection | None) -> None:
        instance = self.machine.instances[instance_id]
        assert instance.is_usable
        assert instance.find(attempt.handle) is attempt
        assert (attempt.prefill if source_id is None else attempt.decode) is instance
        if source_id is not None:
            assert self.machine.instances[source_id].find(attempt.handle) is attempt, "nobody keeps the KV"
        self.sent.append(Sent(attempt, instance_id, source_id, selection))
        self.there.add((attempt.handle, instance_id))

    def cancel(self, attempt: Attempt, instance_id: str) -> None:
        self.cancelled.append((attempt.handle, instance_id))
        self.there.discard((attempt.handle, instance_id))

    def renew_lease(self, attempt: Attempt, instance_id: str) -> None:
        self.renewed.append((attempt.handle, instance_id, self.now_s))

    def end(self, request: RoutedRequest, error: TandemError | None) -> None:
        assert request.key not in self.ends, "a request ends once"
        self.ends[request.key] = error

    def wake_at(self, time_s: float) -> None:
        self.wake_s = time_s

    def join(self, *instance_ids: str, **changes: object) -> None:
        for instance_id in instance_ids:
            self.machine.instance_reported(make_status(instance_id, **changes), self.now_s)
            if not self.machine.instances[instance_id].is_connected:
                self.machine.instance_connected(instance_id, self.now_s)

    def ask(
        self,
        key: object,
        prompt: int = 10,
        output: int = 5,
        deadline_s: float = float("inf"),
        tokens: tuple[int, ...] = (),
        slo: RequestSlo = NO_SLO,
    ) -> RoutedRequest:
        """`tokens`: the names of its blocks."""
        request = RoutedRequest(
            key,
            num_prompt_tokens=prompt,
            max_tokens=output,
            received_s=self.now_s,
            deadline_s=deadline_s,
            name_blocks=(lambda size: tokens) if tokens else None,
            slo=slo,
        )
        self.machine.submit(request, self.now_s)
        return request

    def advance(self, seconds: float) -> None:
        """Wake the machine whenever it wants to be woken."""
        end_s = self.now_s + seconds
        while self.wake_s <= end_s:
            self.now_s, self.wake_s = max(self.now_s, self.wake_s), float("inf")
            self.machine.advance(self.now_s)
        self.now_s = end_s

    def take(self) -> Sent:
        """The oldest submission not yet taken."""
        return self.sent.pop(0)

    def start(self, sent: Sent, cached: int = 0) -> bool:
        return self.machine.prefill_started(sent.attempt, cached, self.now_s)

    def first_token(self, sent: Sent, *, is_last: bool = False) -> bool:
        return self.machine.prefill_finished(sent.attempt, self.now_s, is_last=is_last)

    def fail(self, sent: Sent, error: TandemError) -> bool:
        self.there.discard((sent.attempt.handle, sent.instance_id))
        return self.machine.attempt_failed(sent.attempt, sent.instance_id, error, self.now_s)

    def lose(self, instance_id: str) -> None:
        """Its session ends, and with it what it has of this router."""
        self.there = {each for each in self.there if each[1] != instance_id}
        self.machine.instance_lost(instance_id, self.now_s)

    def commit(self, sent: Sent) -> bool:
        """The decode instance has the KV, and the prefill instance has accepted its acknowledgement."""
        if sent.source_id is not None:
            self.there.discard((sent.attempt.handle, sent.source_id))
        return self.machine.transfer_committed(sent.attempt, self.now_s)

    def finish(self, sent: Sent) -> bool:
        return self.machine.attempt_finished(sent.attempt, self.now_s)

    def loads(self) -> dict[str, tuple[int, int, int]]:
        return {
            name: (instance.open_requests, instance.uncomputed_tokens, instance.held_tokens)
            for name, instance in self.machine.instances.items()
        }
