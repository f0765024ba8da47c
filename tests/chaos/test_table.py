"""docs/failures.md promises nothing that no test proves, and no test here is missing in it."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "failures.md"
COLUMNS = ["what", "fails how", "phase", "the client sees", "within", "blocks", "goes on", "counted", "test"]
PHASES = {"all", "queued", "prefill", "transfer", "decode"}


def _rows() -> list[list[str]]:
    tables = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text().splitlines()
        if line.startswith("|") and not line.startswith("|--")
    ]
    return [row for row in tables if row != COLUMNS]


def _tests_in(path: Path) -> set[str]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, functions) and node.name.startswith("test_")
    }


@pytest.mark.parametrize("row", _rows(), ids=lambda row: f"{row[0]} {row[1]}"[:60])
def test_a_row_is_proved_by_tests_that_exist(row: list[str]) -> None:
    assert len(row) == len(COLUMNS)
    assert set(row[2].split(", ")) <= PHASES
    named = re.findall(r"`(\S+?)::(\w+)`", row[-1])
    assert named
    for path, name in named:
        assert name in _tests_in(TESTS / path)


def test_every_test_is_in_a_row() -> None:
    named = {name for row in _rows() for name in re.findall(r"`chaos/\S+?::(\w+)`", row[-1])}
    files = [path for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__)]
    assert named == set().union(*map(_tests_in, files))
