"""Where a user's own files are."""

from pathlib import Path


def home_folder() -> Path | None:
    """None for a user who has none: HOME is not set and nobody of that number is known, as in some containers."""
    try:
        return Path.home()
    except RuntimeError:
        return None
