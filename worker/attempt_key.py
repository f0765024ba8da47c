"""How a worker's threads name one attempt."""

from dataclasses import dataclass

from tandem.scheduling.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Key:
    """One attempt, as the router of that session named it."""

    session_id: int
    handle: int


def key_of(sequence: Sequence) -> Key:
    assert isinstance(sequence.key, Key), "a worker gives its sequences Keys"
    return sequence.key
