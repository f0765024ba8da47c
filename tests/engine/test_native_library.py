"""Compiling and caching the kernels, with a small source in their place."""

import tempfile
import threading
from pathlib import Path

import pytest

from tandem.engine.ops import native_library
from tandem.engine.ops.native_library import NativeUnavailableError, load_native_library


def _answer(number: int) -> str:
    return f'extern "C" __attribute__((visibility("default"))) int answer() {{ return {number}; }}'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "api.cpp").write_text(_answer(42))
    monkeypatch.setattr(native_library, "_SOURCE_DIR", folder)
    monkeypatch.setattr(native_library, "_declare", lambda library: None)
    try:
        load_native_library(tmp_path / "probe")
    except NativeUnavailableError as error:
        pytest.skip(str(error))
    return folder / "api.cpp"


def test_compiles_once_and_again_when_a_source_changes(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert load_native_library(cache).answer() == 42
    (first,) = cache.glob("*.so")
    made = first.stat().st_mtime_ns
    assert load_native_library(cache).answer() == 42
    assert [path.stat().st_mtime_ns for path in cache.glob("*.so")] == [made]
    source.write_text(_answer(43))
    assert load_native_library(cache).answer() == 43
    assert load_native_library(cache, ("-O1",)).answer() == 43
    assert len(list(cache.glob("*.so"))) == 3


def test_processes_starting_together_compile_once(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Path] = []
    compile_one = native_library._compile

    def count(compiler: str, flags: tuple[str, ...], target: Path) -> None:
        compiled.append(target)
        compile_one(compiler, flags, target)

    monkeypatch.setattr(native_library, "_compile", count)
    threads = [threading.Thread(target=load_native_library, args=(tmp_path / "cache",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 1


def test_a_compiler_that_fails_is_a_reason_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    source.write_text("this is no C++")
    with pytest.raises(NativeUnavailableError, match="failed on the kernels"):
        load_native_library(tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("**/*.so"))


def test_no_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NativeUnavailableError, match="no C\\+\\+ compiler"):
        load_native_library(tmp_path)


def test_a_folder_that_others_may_write_to_is_closed_to_them(source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o777)
    cache.chmod(0o777)
    load_native_library(cache)
    assert cache.stat().st_mode & 0o077 == 0


def test_a_folder_that_cannot_be_made_is_a_reason(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NativeUnavailableError, match="could not be compiled or loaded"):
        load_native_library(tmp_path / "file" / "cache")


def test_a_read_only_home_costs_no_speed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert load_native_library().answer() == 42
    (cache,) = (tmp_path / "temporary").iterdir()
    assert cache.stat().st_mode & 0o077 == 0
    cache.rename(tmp_path / "elsewhere")
    cache.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(NativeUnavailableError, match="is a link, which others may have made"):
        load_native_library()


def test_a_user_without_a_home_costs_no_speed(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert load_native_library().answer() == 42
