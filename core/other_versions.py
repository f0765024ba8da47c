"""Reads settings that another version of Tandem has written, before an upgrade or a roll-back, without those that this
version does not know. Settings that a person writes are read by `core.config_file`, where an unknown one is a mistake.
"""

import copy
import logging
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from tandem.core.config_mistakes import mistakes_of

log = logging.getLogger(__name__)

T = TypeVar("T", bound=BaseModel)


def read_known(model: type[T], fields: Mapping[str, Any]) -> T:
    """The value of JSON `fields`, as `model_dump` writes them. Missing settings have their defaults. Raises ValueError
    if the known settings are no value of `model`."""
    known = copy.deepcopy(dict(fields))
    left_out: list[str] = []
    while True:
        try:
            value = model.model_validate(known)
        except ValidationError as error:
            unknown = [each["loc"] for each in mistakes_of(error, known) if each["type"] == "extra_forbidden"]
            if not unknown:
                raise
            for *path, name in unknown:
                section: Any = known
                for part in path:
                    section = section[part]
                del section[name]
                left_out.append(".".join(map(str, (*path, name))))
            continue
        if left_out:
            log.warning("settings of another version are left out: %s", ", ".join(left_out))
        return value
