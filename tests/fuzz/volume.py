"""How many inputs a fuzzer tries: a sample in the gate, many in the slow target."""

import pytest
from hypothesis import HealthCheck, Phase, settings

_MANY = 1000


def volumes(sample: int, many: int, timeout_s: float = 1800.0) -> pytest.MarkDecorator:
    """Parametrizes a test's argument `count`."""
    slow = (pytest.mark.slow, pytest.mark.timeout(timeout_s))
    return pytest.mark.parametrize(
        "count", [pytest.param(sample, id="sample"), pytest.param(many, id="many", marks=slow)]
    )


def tries(count: int) -> settings:
    """A sample in the gate is the same each time, so that what it has to contain is there."""
    return settings(
        max_examples=count,
        derandomize=count < _MANY,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
