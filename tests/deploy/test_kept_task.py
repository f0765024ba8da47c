import pytest

from tandem.deploy import kept_task
from tandem.deploy.kept_task import keep


async def test_work_that_fails_says_so_and_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_task, "_AGAIN_S", 0.01)
    tries, said = 0, list[str]()

    async def work() -> None:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise ValueError("a fault")

    await keep("the care for logs", work, said.append)
    assert said == 2 * ["  the care for logs failed (ValueError: a fault); it begins again"]
