"""The corpus leaves out what it must and loses nothing else."""

import ast
import random
from pathlib import Path

import pytest

from tandem.models.stdlib_corpus import SourceFile, chats, corpus_digest, pieces, split_held_out, standard_library

MODULE = '''"""A module."""
import os


def shout(word):
    """Return the word in capitals.

    Longer words are louder."""
    return word.upper()


@os.fspath
class Thing:
    def size(self):
        """The number of parts"""
        return 3

    def undocumented(self):
        return 4
'''


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("b.py", "copy.py", "a/c.py", "test/d.py", "site-packages/e.py", "_sysconfigdata_x.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"x = {name!r}\n")
    (tmp_path / "copy.py").write_text((tmp_path / "b.py").read_text())
    (tmp_path / "broken.py").write_text("def (\n")
    (tmp_path / "latin.py").write_bytes(b"x = '\xe9'\n")
    return tmp_path


def test_tests_copies_tables_and_broken_files_are_left_out(root: Path) -> None:
    assert [file.name for file in standard_library(root)] == ["a/c.py", "b.py"]


def test_held_out_files_are_whole_and_drawn_by_the_seed() -> None:
    files = [SourceFile(f"{number}.py", "x" * (10 + number)) for number in range(200)]
    training, held_out = split_held_out(files, 0.1, seed=3)
    assert sorted([*training, *held_out], key=lambda file: len(file.text)) == files
    share = sum(len(file.text) for file in held_out) / sum(len(file.text) for file in files)
    assert 0.1 <= share < 0.12
    assert split_held_out(files, 0.1, seed=3) == (training, held_out)
    assert split_held_out(files, 0.1, seed=4) != (training, held_out)
    assert corpus_digest(training) != corpus_digest(held_out)


def test_pieces_are_python_and_hold_all_lines() -> None:
    cuts = set()
    for seed in range(20):
        parts = list(pieces(SourceFile("m.py", MODULE), random.Random(seed)))
        cuts.add(len(parts))
        for part in parts:
            ast.parse(part)
        assert "".join(parts).replace("\n", "") == MODULE.replace("\n", "")
    assert cuts == {1, 2, 3}


def test_chats_ask_for_documented_functions() -> None:
    found = list(chats(SourceFile("m.py", MODULE), random.Random(0)))
    assert len(found) == 2
    assert found[0].question.lower() == "write a function shout that returns the word in capitals."
    assert found[0].answer.startswith("def shout(word):\n    ")
    assert found[1].question.lower() == "write a function size: the number of parts."
    assert found[1].answer == 'def size(self):\n    """The number of parts"""\n    return 3\n'
