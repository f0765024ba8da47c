"""The user's home folder."""

from pathlib import Path


def home_folder() -> Path | None:
    """None for a user without one: HOME is not set, and the system does not know the user, as in some containers."""
    try:
        return Path.home()
    except RuntimeError:
        return None
