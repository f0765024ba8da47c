"""The connection between rank 0 of an instance and another rank: frames on a stream socket, which is a pair of
sockets on one host, and TCP between hosts (`worker/ranks/joining.py`).

    rank 0                          other rank
      | -- ASSIGN: JSON ------------> |   what to load (`RankAssignment`)
      | <-- SHARE: a value ---------> |   of `RankStore`, between hosts: rank 0 passes it on to all others
      |                               |   (load)
      | <-- READY: JSON ------------- |   what has been loaded (`LoadedRank`)
      | <-- ALIVE, every 0.2 s ------ |   from a thread of its own, also during a step
      | -- STEP: `engine.step_bytes`->|   ...
      | <-- REPORT: `RankReport` ---- |   between hosts, after each layer of steps with prompts
      | -- STOP --------------------> |
      | <-- FAILED: a sentence -----> |   in place of any of these; the instance ends

A frame: length of the payload u32, kind u8, payload; little-endian. The end of the connection is the end of the peer.
"""

import contextlib
import json
import socket
import struct
import threading
from dataclasses import asdict, dataclass
from enum import IntEnum

from tandem.core.errors import InternalError
from tandem.core.instance_section import EngineSection
from tandem.core.parallel import RankHosts

_HEADER = struct.Struct("<IB")
_REPORT = struct.Struct("<QI")
_MAX_BYTES = 1 << 30


class FrameKind(IntEnum):
    ASSIGN = 1
    READY = 2
    ALIVE = 3
    STEP = 4
    STOP = 5
    FAILED = 6
    SHARE = 7
    REPORT = 8


@dataclass(frozen=True, slots=True)
class RankReport:
    """A rank has computed `layers` of its layers in a step."""

    step: int
    layers: int

    def to_bytes(self) -> bytes:
        return _REPORT.pack(self.step, self.layers)

    @classmethod
    def from_bytes(cls, data: bytes) -> "RankReport":
        return cls(*_REPORT.unpack(data))


@dataclass(frozen=True, slots=True)
class RankAssignment:
    """What rank `rank` of an instance is to load. Of an instance on several hosts, `per_host` is that of `RankHosts`,
    and other hosts reach the rank's host at `address`; else they are empty."""

    rank: int
    section: EngineSection
    per_host: tuple[int, ...] = ()
    address: str = ""

    @property
    def hosts(self) -> RankHosts | None:
        return RankHosts(self.section.shape, self.per_host) if self.per_host else None

    def to_bytes(self) -> bytes:
        fields = {"rank": self.rank, "per_host": self.per_host, "address": self.address}
        return json.dumps(fields | {"engine": self.section.model_dump(mode="json")}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "RankAssignment":
        fields = json.loads(data)
        section = EngineSection.model_validate(fields["engine"])
        return cls(fields["rank"], section, tuple(fields["per_host"]), fields["address"])


@dataclass(frozen=True, slots=True)
class LoadedRank:
    """Properties that all ranks of an instance must have in common. `weights_hash` is empty where a rank has not
    read all files: one rank of each host does."""

    weights_hash: str
    dtype: str
    activation_dtype: str
    num_blocks: int

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "LoadedRank":
        return cls(**json.loads(data))


class RankChannel:
    """One side. Frames may be sent from several threads; one thread receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._sending = threading.Lock()

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, kind: FrameKind, payload: bytes = b"") -> None:
        """Raises OSError when the peer is gone."""
        with self._sending:
            self._connection.sendall(_HEADER.pack(len(payload), kind) + payload)

    def receive(self) -> tuple[FrameKind, bytes]:
        """The next frame. Raises EOFError when the peer is gone, and InternalError for what is not a frame."""
        length, kind = _HEADER.unpack(self._read(_HEADER.size))
        if length > _MAX_BYTES or kind not in FrameKind.__members__.values():
            raise InternalError("The other rank sent something that is not a frame")
        return FrameKind(kind), self._read(length)

    def close(self) -> None:
        """Also ends a `receive` of another thread."""
        with contextlib.suppress(OSError):  # the peer is gone
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def _read(self, count: int) -> bytes:
        data = bytearray(count)
        view, done = memoryview(data), 0
        while done < count:
            try:
                got = self._connection.recv_into(view[done:])
            except OSError as error:
                raise EOFError from error
            if got == 0:
                raise EOFError
            done += got
        return bytes(data)
