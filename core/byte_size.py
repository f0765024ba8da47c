"""Sizes in configuration files and on the command line: a number of bytes, with or without a unit."""

import re
from typing import Annotated

from pydantic import BeforeValidator, Field

MOST_BYTES = 1 << 60
"""Upper bound of sizes in settings: more memory than any machine has."""

_UNITS = {"": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse_bytes(value: object) -> object:
    """512MiB, 2 GB or a plain number of bytes -> int. Anything else is left for pydantic to refuse."""
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]*)\s*", value)):
        factor = _UNITS.get(match[2].upper())
        if factor is not None:
            return int(float(match[1]) * factor)
    return value


Bytes = Annotated[int, BeforeValidator(parse_bytes, json_schema_input_type=int | str), Field(gt=0, le=MOST_BYTES)]
