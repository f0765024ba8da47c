from pathlib import Path

import pytest

from tandem.core.errors import NotFoundError
from tandem.deploy.log_file import LogPart, follow_log, read_log


def test_the_last_lines_and_then_whole_ones(tmp_path: Path) -> None:
    path = tmp_path / "decode-0.log"
    path.write_text("one\ntwo\nthree\n")
    first = read_log(tmp_path, "decode-0", 2, None)
    assert first.lines == ("two", "three")
    with path.open("a") as log:
        log.write("four\nfi")
    second = read_log(tmp_path, "decode-0", 2, first.position)
    assert second.lines == ("four",)
    with path.open("a") as log:
        log.write("ve\n")
    assert read_log(tmp_path, "decode-0", 2, second.position).lines == ("five",)
    path.write_text("begun again\n")  # it was moved away because it was long
    assert read_log(tmp_path, "decode-0", 2, second.position).lines == ("begun again",)


def test_the_end_of_a_process_that_was_cut_off_is_shown(tmp_path: Path) -> None:
    (tmp_path / "decode-0.log").write_bytes(b"one\n\xff no end of line")
    assert read_log(tmp_path, "decode-0", 1, None).lines == ("\ufffd no end of line",)
    assert read_log(tmp_path, "decode-0", 0, None).lines == ()


@pytest.mark.parametrize("name", ["decode-1", "../secret", "", "."])
def test_there_are_no_other_files(tmp_path: Path, name: str) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "decode-0.log").write_text("x\n")
    (tmp_path / "secret.log").write_text("y\n")
    with pytest.raises(NotFoundError, match=r"there is no log of '.*'; there is decode-0|there is decode-0"):
        read_log(logs, name, 1, None)


async def test_parts_until_there_is_nothing_more() -> None:
    parts = iter([LogPart(("a",), 1), LogPart(("b", "c"), 2), LogPart((), 2), LogPart(("never",), 3)])
    asked: list[int | None] = []

    async def read(position: int | None) -> LogPart:
        asked.append(position)
        return next(parts)

    assert [lines async for lines in follow_log(read, follow=False)] == [("a",), ("b", "c")]
    assert asked == [None, 1, 2]
