"""The id of an instance: its name, and a suffix that is new at each start of its process."""

import re

_ID = re.compile(r"(?P<name>.+)-[0-9a-f]{8}", re.DOTALL)


def make_instance_id(name: str, suffix: int) -> str:
    """`suffix` is a random number of 32 bits, so that a restarted instance is not mistaken for the old one."""
    return f"{name}-{suffix:08x}"


def instance_name(instance_id: str) -> str:
    """The name in an id, which stays the same over restarts. An id of another form is its own name."""
    match = _ID.fullmatch(instance_id)
    return instance_id if match is None else match["name"]
