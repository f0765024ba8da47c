"""What workers, controllers and commands say and ask at the router's control port."""

import logging
from pathlib import Path

from tandem.core.clock import Clock
from tandem.core.config_file import load_config
from tandem.core.errors import ConfigError, InvalidRequestError, NotFoundError
from tandem.core.plan import Plan
from tandem.core.replanning import ReplanStatus
from tandem.core.session import InstanceStatus
from tandem.core.workload_profile import ProfileSnapshot, WorkloadProfile
from tandem.router.dispatch import Dispatcher
from tandem.router.records import RequestLog
from tandem.wire.fleet import FleetDescription

logger = logging.getLogger(__name__)

_LATEST = 20  # requests, of which a line is shown


class FleetRegistry:
    """Heartbeats and questions of the control port, on the router's state. Implements `wire.fleet.Registry`."""

    def __init__(
        self,
        model: str,
        dispatcher: Dispatcher,
        log: RequestLog,
        profile: WorkloadProfile,
        clock: Clock,
        plan_file: Path | None,
    ) -> None:
        """`plan_file`: a plan to show instead of the controller's."""
        self.replan: ReplanStatus | None = None
        self.plan = None if plan_file is None else _read_plan(plan_file)
        self._plan_json = ""
        self._has_plan_file = plan_file is not None
        self._model = model
        self._dispatcher = dispatcher
        self._log = log
        self._profile = profile
        self._clock = clock
        self._started_s = clock.now_s()

    def heartbeat(self, status: InstanceStatus) -> None:
        self._dispatcher.fleet.heartbeat(status)

    def describe(self) -> FleetDescription:
        return FleetDescription(
            model=self._model,
            uptime_s=self._clock.now_s() - self._started_s,
            instances=tuple(instance.status for instance in self._dispatcher.fleet.instances),
            running_requests=self._dispatcher.running_requests,
            queued_requests=self._dispatcher.queued_requests,
            replan=self.replan,
        )

    def explain(self, request_id: str) -> str:
        if not request_id:
            return "\n".join(record.summary() for record in self._log.latest(_LATEST))
        if text := self._log.explain(request_id):
            return text
        raise NotFoundError(f"this router does not remember a finished request {request_id!r}")

    def profile(self) -> ProfileSnapshot | None:
        return self._profile.snapshot(self._clock.now_s())

    def replan_reported(self, status: ReplanStatus) -> None:
        self.replan = status

    def plan_reported(self, plan_json: str) -> None:
        """A controller reports it again and again."""
        if self._has_plan_file or plan_json == self._plan_json:
            return
        try:
            plan = Plan.model_validate_json(plan_json) if plan_json else None
        except ValueError as error:
            raise InvalidRequestError(f"this is no plan that this router can read ({error})") from error
        self.plan, self._plan_json = plan, plan_json
        self.replan = None  # of the plan before


def _read_plan(path: Path) -> Plan | None:
    """None, and a warning, for a plan that cannot be read: what is only shown must not keep a router from serving."""
    try:
        return load_config(path, Plan)
    except ConfigError as error:
        logger.warning("/ui shows no plan: %s", error.message)
        return None
