"""The page docs/fidelity.md: each programme of `bench.fidelity` writes its own section."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "fidelity.md"
_HEAD = (
    "# Fidelity\n\nHow far the simulator is from measurements. A programme of `bench.fidelity` writes each section.\n"
)


def write_section(title: str, text: str, page: Path = PAGE) -> None:
    """Replace the section of that title, or append it to the page."""
    document = page.read_text(encoding="utf-8") if page.exists() else ""
    page.write_text(replace_section(document, title, text), encoding="utf-8")


def replace_section(document: str, title: str, text: str) -> str:
    """`document` with `text` as the section `title`."""
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
