"""An instance in this process, with the built-in model."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tandem.core.config import WorkerConfig
from tandem.core.instance_section import EngineSection, InstanceSection
from tandem.scheduling.leases import LeaseTable
from tandem.worker.app import Worker

MODEL = Path(__file__).parents[2] / "models" / "tiny-python"


@asynccontextmanager
async def running_worker() -> AsyncIterator[Worker]:
    section = InstanceSection(engine=EngineSection(device="cpu", threads=1, kv_memory=4 << 20))
    worker = Worker(WorkerConfig(model=MODEL, name="decode-0", role="decode", routers=(), instance=section))
    await worker.start()
    try:
        yield worker
    finally:
        await worker.drain_and_stop(0.0)


async def test_a_task_that_fails_is_the_end_of_the_instance(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def expire(table: LeaseTable, now_s: float) -> list[object]:
        raise ZeroDivisionError("a bug")

    async with running_worker() as worker:
        closed = asyncio.create_task(worker.wait_closed())
        await asyncio.sleep(0.3)
        assert not closed.done()
        monkeypatch.setattr(LeaseTable, "expire", expire)
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(closed, 5)
    assert "the task 'leases' has ended" in caplog.text


async def test_an_id_begins_with_the_name_and_is_new_at_each_start() -> None:
    config = WorkerConfig(model=MODEL, name="decode-0", role="decode")
    ids = {Worker(config).instance_id for _ in range(2)} | {
        Worker(config.model_copy(update={"name": None})).instance_id
    }
    assert len(ids) == 3
    assert [len(each.rsplit("-", 1)[1]) for each in ids] == [8, 8, 8]
    assert sorted(each.rsplit("-", 1)[0] for each in ids) == ["decode", "decode-0", "decode-0"]


def test_a_name_is_one_word() -> None:
    with pytest.raises(ValueError, match="pattern"):
        WorkerConfig(model=MODEL, name='x"} 1')
