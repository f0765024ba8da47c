"""Adds the router's requests to its workload profile."""

from collections.abc import Sequence

from tandem.core.errors import TandemError
from tandem.core.timeline import Stage
from tandem.core.workload_profile import ServedRequest, WorkloadProfile
from tandem.router.records import RequestRecord


class ProfileObserver:
    """A `RequestObserver` that also counts arrivals. Cancelled requests count with the tokens they had produced.
    `classes` are the names of the plan's SLO classes; a request of none of them counts as of the first one."""

    def __init__(self, profile: WorkloadProfile, classes: Sequence[str] = ()) -> None:
        self._profile = profile
        self._classes = {name: index for index, name in enumerate(classes)}

    def arrived(self, now_s: float) -> None:
        """A request has come in token ids; it may still be refused."""
        self._profile.arrived(now_s)

    def finished(self, record: RequestRecord) -> None:
        timeline = record.timeline
        if timeline.num_output_tokens > 0:
            self._profile.finished(
                ServedRequest(
                    timeline.num_prompt_tokens,
                    timeline.num_output_tokens,
                    timeline.num_cached_tokens,
                    self._classes.get(record.slo.name, 0),
                ),
                timeline.stamps[Stage.FINISHED],
            )

    def refused(self, error: TandemError, record: RequestRecord | None = None) -> None:
        """No effect: an accepted request was counted at its arrival, a malformed one does not count."""
