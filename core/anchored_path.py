"""Paths of a configuration file: a relative one starts at the file's folder, and `~` is the home folder."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ValidationInfo

from tandem.core.printable import printable

_FOLDER = "folder"


def relative_to(folder: Path) -> dict[str, Path]:
    """The validation context in which relative paths of a configuration count from `folder`. Without it they stay."""
    return {_FOLDER: folder.absolute()}


def anchor(path: Path, info: ValidationInfo) -> Path:
    """Raises ValueError for what cannot be a path."""
    if not info.context:
        return path
    try:
        return Path(info.context[_FOLDER], path.expanduser()).resolve()
    except (RuntimeError, OSError, ValueError) as error:  # a home folder of nobody, a loop of links, a NUL
        raise ValueError(f"{printable(str(path))} is not the path of a file or folder") from error


def _anchor_folder(name: str, info: ValidationInfo) -> str:
    folder = anchor(Path(name), info)
    try:
        return str(folder) if info.context and folder.is_dir() else name
    except OSError as error:  # such as a name that is too long
        raise ValueError(f"{printable(name)} is not a name or path") from error


def anchor_file(path: Path, info: ValidationInfo) -> Path:
    """Keeps links: a file that is replaced by its link, as Kubernetes replaces secrets, is read at its new place."""
    if not info.context:
        return path
    try:
        whole = Path(info.context[_FOLDER], path.expanduser())
        is_path = b"\0" not in os.fsencode(whole)
    except (RuntimeError, ValueError) as error:  # a home folder of nobody, half of a surrogate pair
        raise ValueError(f"{printable(str(path))} is not the path of a file") from error
    if not is_path:
        raise ValueError(f"{printable(str(path))} is not the path of a file")
    return whole


AnchoredPath = Annotated[Path, AfterValidator(anchor)]
AnchoredFile = Annotated[Path, AfterValidator(anchor_file)]
"""A file that may be replaced while it is in use."""
ModelName = Annotated[str, AfterValidator(_anchor_folder)]
"""The name of a published model, or a checkpoint's folder: what is a folder beside the file is one."""
