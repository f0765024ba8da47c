"""Reading of files that users name."""

import os
from pathlib import Path

import pytest

from tandem.core.input_file import read_input


def test_content_up_to_the_bound(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_input(path, 5) == b"12345"
    with pytest.raises(OSError, match="larger than 0 KiB"):
        read_input(path, 4)
    with pytest.raises(OSError, match="larger than 3 MiB"):
        read_input(Path("/dev/zero"), 3 << 20)


def test_a_folder_and_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        read_input(tmp_path, 5)
    with pytest.raises(FileNotFoundError):
        read_input(tmp_path / "none", 5)


def test_a_pipe_is_read_to_its_end() -> None:
    """As of a shell's <(command)."""
    reading, writing = os.pipe()
    try:
        os.write(writing, b"12345")
        os.close(writing)
        assert read_input(Path(f"/dev/fd/{reading}"), 10) == b"12345"
    finally:
        os.close(reading)


def test_a_pipe_without_a_writer_is_empty(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert read_input(tmp_path / "pipe", 10) == b""
