"""What a measurement fails with."""

from tandem.core.errors import UnavailableError


class MeasurementError(UnavailableError):
    """What is to be measured did not start, did not answer as expected, or was measured too briefly."""
