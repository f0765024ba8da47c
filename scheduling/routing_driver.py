"""The interface through which the routing machine's decisions are carried out, by the live router or the simulator."""

import math
from typing import Protocol

from tandem.core.errors import TandemError
from tandem.scheduling.routed_request import Attempt, RoutedRequest
from tandem.scheduling.routing import Selection


class RoutingDriver(Protocol):
    """Carries out decisions. No call blocks. `submit` may call `RoutingMachine.attempt_failed` before it returns."""

    def submit(self, attempt: Attempt, instance_id: str, source_id: str | None, selection: Selection | None) -> None:
        """Send the attempt to an instance. `source_id`: the instance from which it fetches the KV, None if it computes
        the prompt itself."""
        ...

    def cancel(self, attempt: Attempt, instance_id: str) -> None:
        """Cancel the attempt at an instance, in any phase."""
        ...

    def renew_lease(self, attempt: Attempt, instance_id: str) -> None:
        """Renew the instance's lease on the attempt's KV, whose reader still waits."""
        ...

    def end(self, request: RoutedRequest, error: TandemError | None) -> None:
        """The request has ended; `error` None: it is complete."""
        ...

    def wake_at(self, time_s: float) -> None:
        """Call `RoutingMachine.advance` at that time, instead of at the time of the last call; inf: never."""
        ...


class WakeUp:
    """Keeps the earliest time that was asked for as the driver's next call of `RoutingMachine.advance`."""

    __slots__ = ("_driver", "_time_s")

    def __init__(self, driver: RoutingDriver) -> None:
        self._driver = driver
        self._time_s = math.inf

    def at(self, time_s: float) -> None:
        """Wake up at that time or earlier."""
        if time_s < self._time_s:
            self._time_s = time_s
            self._driver.wake_at(time_s)

    def has_come(self) -> None:
        """The driver has called `advance`."""
        self._time_s = math.inf

    def cancel(self) -> None:
        """No time is needed any more."""
        if self._time_s < math.inf:
            self._time_s = math.inf
            self._driver.wake_at(math.inf)
