"""The plan file: the plan, below a few words for who opens it."""

from pathlib import Path

from tandem.core.config_file import dump_config
from tandem.placement.evidence import Planned
from tandem.placement.report import words


def write_plan(planned: Planned, path: Path) -> None:
    """`core.config_file.load_config(path, Plan)` reads it. Raises OSError."""
    text = (
        f"# {words.headline(planned)}\n"
        f"# Written by tandem {planned.evidence.reproduction.version}; edit it as you like: it is checked when read.\n"
        f"# tandem simulate tries it under another load; tandem serve runs it, or says what it cannot run yet.\n"
        f"{dump_config(planned.plan)}"
    )
    path.write_text(text, encoding="utf-8")
