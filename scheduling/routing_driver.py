"""What carries out the decisions of the routing machine: the live router, or the simulator."""

import math
from typing import Protocol

from tandem.core.errors import TandemError
from tandem.scheduling.routed_request import Attempt, RoutedRequest
from tandem.scheduling.routing import Selection


class RoutingDriver(Protocol):
    """What carries decisions out. No call blocks. From `submit` it may report at once that the attempt has failed."""

    def submit(self, attempt: Attempt, instance_id: str, source_id: str | None, selection: Selection | None) -> None:
        """Send the attempt there. `source_id`: the instance that computes the KV, None if this one does."""
        ...

    def cancel(self, attempt: Attempt, instance_id: str) -> None:
        """Take the attempt off an instance, in whatever phase it is there."""
        ...

    def renew_lease(self, attempt: Attempt, instance_id: str) -> None:
        """Have the instance hold the attempt's KV for longer: its reader still waits."""
        ...

    def end(self, request: RoutedRequest, error: TandemError | None) -> None:
        """The request is over; `error` None: it has all its tokens."""
        ...

    def wake_at(self, time_s: float) -> None:
        """Call `advance` at that time, rather than at the one named before; inf: never."""
        ...


class WakeUp:
    """When the driver is to call `RoutingMachine.advance` next: the earliest time that was asked for."""

    __slots__ = ("_driver", "_time_s")

    def __init__(self, driver: RoutingDriver) -> None:
        self._driver = driver
        self._time_s = math.inf

    def at(self, time_s: float) -> None:
        """Not later than that."""
        if time_s < self._time_s:
            self._time_s = time_s
            self._driver.wake_at(time_s)

    def came(self) -> None:
        """The driver has called; it waits for another time now."""
        self._time_s = math.inf

    def cancel(self) -> None:
        """Nothing is left to wait for."""
        if self._time_s < math.inf:
            self._time_s = math.inf
            self._driver.wake_at(math.inf)
