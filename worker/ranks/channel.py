"""The connection between rank 0 of an instance and another rank: frames on a stream socket.

    rank 0                          other rank
      | -- ASSIGN: JSON ------------> |   what to load, and where the ranks meet
      |                               |   (load)
      | <-- READY ------------------- |
      | <-- ALIVE, every 0.2 s ------ |   from a thread of its own, also during a step
      | -- STEP: `engine.step_bytes`->|   ...
      | -- STOP --------------------> |
      | <-- FAILED: a sentence ------ |   in place of any of these; the rank ends

A frame: length of the payload u32, kind u8, payload; little-endian. The end of the connection is the end of the peer.
"""

import socket
import struct
import threading
from enum import IntEnum

from tandem.core.errors import InternalError

_HEADER = struct.Struct("<IB")
_MAX_BYTES = 1 << 30


class FrameKind(IntEnum):
    ASSIGN = 1
    READY = 2
    ALIVE = 3
    STEP = 4
    STOP = 5
    FAILED = 6


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
