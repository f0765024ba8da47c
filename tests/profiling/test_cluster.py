"""Processes that are started for a measurement."""

from pathlib import Path

import pytest

from tandem.profiling.cluster import ClusterLauncher
from tandem.profiling.errors import MeasurementError


async def test_the_callers_folder_hides_no_module_unless_it_is_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "this.py").write_text("print('the module of the checkout')")
    monkeypatch.chdir(tmp_path)
    async with ClusterLauncher(tmp_path) as launcher:
        assert (await launcher.start("this", num_lines=1)).lines == ("The Zen of Python, by Tim Peters",)
        started = await launcher.start("this", num_lines=1, checkout=tmp_path)
    assert started.lines == ("the module of the checkout",)
    assert started.process.returncode is not None, "the launcher's end is the process's"


async def test_a_process_that_does_not_start_is_reported_with_its_last_line(tmp_path: Path) -> None:
    async with ClusterLauncher(tmp_path) as launcher:
        with pytest.raises(MeasurementError, match=r"tandem\.no_such_module did not start: .*No module named"):
            await launcher.start("tandem.no_such_module", num_lines=1)
