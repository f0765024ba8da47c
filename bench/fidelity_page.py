"""docs/fidelity.md, each of whose sections is written by the script that measures it."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "fidelity.md"
_HEAD = "# Fidelity\n\nHow far the simulator is from what was measured. Each section is a script's.\n"


def write_section(title: str, text: str, page: Path = PAGE) -> None:
    """Put the section in the place of the old one, or at the page's end. Other sections stay."""
    document = page.read_text(encoding="utf-8") if page.exists() else ""
    page.write_text(replace_section(document, title, text), encoding="utf-8")


def replace_section(document: str, title: str, text: str) -> str:
    """`document` with `text` under the heading `title` instead of what stood there."""
    section = f"## {title}\n\n{text.strip()}\n"
    document = document or _HEAD
    pattern = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if pattern.search(document):
        return pattern.sub(lambda _: section + "\n", document, count=1).rstrip("\n") + "\n"
    return document.rstrip("\n") + "\n\n" + section


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a table; numbers are given as text or as they print."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return lines
