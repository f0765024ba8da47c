"""A TCP proxy before an instance's port, with which a test breaks what its peers say to it: one peer's or everybody's.

    peer ---- LinkProxy(mode) ---- instance

Modes: "pass"; "stall" (bytes wait, connections stay open); "slow" (each read waits a little); "refuse" (open
connections end, new ones end at once).
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

SLOW_S = 0.05
_CHUNK_BYTES = 1 << 16


class LinkProxy:
    """`port`, on loopback, forwards to the address in the file `target`. `set` changes the mode of one peer, given by
    its pid."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._modes: dict[int, str] = {}
        self._connections: list[tuple[int, socket.socket, socket.socket]] = []  # the peer's pid, both ends
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def set(self, peer_pid: int, mode: str) -> None:
        self._modes[peer_pid] = mode
        if mode == "refuse":
            for pid, peer, instance in list(self._connections):
                if pid == peer_pid:
                    _end(peer, instance)

    def heal(self) -> None:
        self._modes.clear()

    def close(self) -> None:
        self._listener.close()
        for _, peer, instance in list(self._connections):
            _end(peer, instance)

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        pid = _pid_of_client(peer)
        try:
            host, port = self._target.read_text().split(":")
            instance = socket.create_connection((host, int(port)))
        except OSError:
            peer.close()
            return
        if self._modes.get(pid) == "refuse":
            _end(peer, instance)
            return
        connection = (pid, peer, instance)
        self._connections.append(connection)
        mode: Callable[[], str] = lambda: self._modes.get(pid, "pass")  # noqa: E731
        threading.Thread(target=_pump, args=(peer, instance, mode), daemon=True).start()
        _pump(instance, peer, mode)
        with contextlib.suppress(ValueError):
            self._connections.remove(connection)


def _pump(source: socket.socket, destination: socket.socket, mode: Callable[[], str]) -> None:
    with contextlib.suppress(OSError):
        while received := source.recv(_CHUNK_BYTES):
            if mode() == "slow":
                time.sleep(SLOW_S)
            while mode() == "stall":
                time.sleep(0.01)
            destination.sendall(received)
    _end(source, destination)


def _end(*ends: socket.socket) -> None:
    for end in ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()


def _pid_of_client(peer: socket.socket) -> int:
    """The process of this user at the other end; 0 if it has gone."""
    port = peer.getpeername()[1]
    for connection in psutil.net_connections("tcp"):  # gRPC's sockets are of IPv6, with addresses of IPv4 in them
        if connection.laddr and connection.laddr.port == port and connection.pid is not None:
            return int(connection.pid)
    return 0
