"""Where a router's requests meet its workload profile."""

from tandem.core.errors import TandemError
from tandem.core.timeline import Stage
from tandem.core.workload_profile import ServedRequest, WorkloadProfile
from tandem.router.records import RequestRecord


class ProfileObserver:
    """A `RequestObserver` and an `ArrivalObserver`. Every answer counts as long as it became, a cancelled one too: that
    much was worked. The router knows no SLO classes yet, so all requests are of the first."""

    def __init__(self, profile: WorkloadProfile) -> None:
        self._profile = profile

    def arrived(self, now_s: float) -> None:
        self._profile.arrived(now_s)

    def finished(self, record: RequestRecord) -> None:
        timeline = record.timeline
        if timeline.num_output_tokens > 0:
            self._profile.finished(
                ServedRequest(timeline.num_prompt_tokens, timeline.num_output_tokens, timeline.num_cached_tokens),
                timeline.stamps[Stage.FINISHED],
            )

    def refused(self, error: TandemError) -> None:
        """It has been counted when it arrived, unless it asked for what cannot be served."""
