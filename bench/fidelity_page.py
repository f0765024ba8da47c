"""docs/fidelity.md, whose sections are written by the scripts that measure them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "fidelity.md"


def write_section(title: str, text: str, page: Path = PAGE) -> None:
    """Replace what stands between the markers of `title`, or add the markers and the text at the end."""
    begin, end = f"<!-- begin {title} -->", f"<!-- end {title} -->"
    block = f"{begin}\n{text.strip()}\n{end}"
    old = page.read_text(encoding="utf-8") if page.exists() else "# How far the simulator can be trusted\n"
    before, found, rest = old.partition(begin)
    appended = f"{old.rstrip()}\n\n## {title}\n\n{block}\n"
    new = before + block + rest.partition(end)[2] if found else appended
    page.write_text(new, encoding="utf-8")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a table; numbers are given as text or as they print."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return lines
