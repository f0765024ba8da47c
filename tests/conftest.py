from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("tandem", deadline=None)  # a busy machine is no failure
settings.load_profile("tandem")

REAL_PROCESSES = {"chaos", "cli", "cluster", "deploy"}  # folders whose tests start whole clusters


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole clusters last: `make test` runs some folders beside the other tests, and then the machine is theirs."""
    here = Path(__file__).parent
    items.sort(key=lambda item: item.path.relative_to(here).parts[0] in REAL_PROCESSES)


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that a test starts run without coverage, under which a planner takes several times as long."""
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)
