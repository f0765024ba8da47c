"""How many inputs a fuzzer tries: a sample in the gate, many in the slow target."""

import pytest
from hypothesis import HealthCheck, Phase, settings


def volumes(sample: int, many: int, timeout_s: float = 1800.0) -> pytest.MarkDecorator:
    """Parametrizes a test's argument `count`."""
    slow = (pytest.mark.slow, pytest.mark.timeout(timeout_s))
    return pytest.mark.parametrize(
        "count", [pytest.param(sample, id="sample"), pytest.param(many, id="many", marks=slow)]
    )


def tries(count: int) -> settings:
    return settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
