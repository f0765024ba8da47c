"""Ranks of other hosts join rank 0 over real sockets; others do not."""

import asyncio
import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tandem.core.config import WorkerConfig
from tandem.core.errors import ConfigError
from tandem.core.parallel import ParallelShape, RankHosts
from tandem.worker.ranks import host, joining
from tandem.worker.ranks.channel import FrameKind, RankChannel
from tandem.worker.ranks.joining import HostTicket, JoinRequest, Purpose, admit, join
from tandem.worker.ranks.listener import JoinedRank, RankListener
from tests.cluster.harness import free_port

TOKEN = "a secret"
HOSTS = RankHosts(ParallelShape(2, 3), (1, 2, 3))


class Bench:
    def __init__(self) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.hosts: list[RankChannel] = []  # rank 0's ends
        self.joined: list[RankChannel] = []  # the other ones
        self.ranks: dict[int, JoinedRank] = {}
        self.listener = RankListener(self.address, TOKEN, HOSTS, lambda host, _: self.hosts.append(host), self._joined)
        self.listener.start()

    def _joined(self, rank: JoinedRank) -> None:
        self.ranks[rank.rank] = rank

    def host(self) -> HostTicket:
        channel = RankChannel(join(self.address, TOKEN, JoinRequest(Purpose.HOST)))
        self.joined.append(channel)
        kind, payload = channel.receive()
        assert kind is FrameKind.ASSIGN
        return HostTicket.from_bytes(payload)

    def rank(self, ticket: HostTicket, rank: int) -> tuple[socket.socket, socket.socket]:
        requests = (JoinRequest(purpose, rank, ticket.ticket) for purpose in (Purpose.RANK, Purpose.KV))
        frames, kv = (join(self.address, TOKEN, request) for request in requests)
        return frames, kv


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.listener.close()
    for channel in (*bench.hosts, *bench.joined):
        channel.close()
    for rank in bench.ranks.values():
        rank.channel.close()
        rank.kv.close()


def until(is_true: Callable[[], bool]) -> None:
    until_s = time.monotonic() + 10
    while not is_true():
        assert time.monotonic() < until_s
        time.sleep(0.01)


def is_closed(connection: socket.socket) -> bool:
    connection.settimeout(10)
    return connection.recv(1) == b""


def test_hosts_get_ranks_in_the_order_in_which_they_come(bench: Bench) -> None:
    first, second = bench.host(), bench.host()
    assert [(ticket.host, ticket.hosts) for ticket in (first, second)] == [(1, HOSTS), (2, HOSTS)]
    joined = {rank: bench.rank(ticket, rank) for ticket in (second, first) for rank in HOSTS.ranks_of(ticket.host)}
    until(lambda: len(bench.ranks) == 5)
    for rank, (frames, kv) in joined.items():
        bench.ranks[rank].channel.send(FrameKind.STEP, bytes([rank]))
        bench.ranks[rank].kv.sendall(bytes([100 + rank]))
        assert RankChannel(frames).receive() == (FrameKind.STEP, bytes([rank]))
        assert kv.recv(1) == bytes([100 + rank])
        frames.close()
        kv.close()
    until(lambda: _is_deaf(bench.address))


def _is_deaf(address: str) -> bool:
    with socket.socket() as probe:
        host, _, port = address.partition(":")
        return probe.connect_ex((host, int(port))) != 0


def test_no_host_more_than_there_are(bench: Bench) -> None:
    for _ in range(2):
        bench.host()
    channel = RankChannel(join(bench.address, TOKEN, JoinRequest(Purpose.HOST)))
    assert channel.receive() == (FrameKind.FAILED, b"all hosts of the instance are there already")
    assert len(bench.hosts) == 2
    channel.close()


def test_a_rank_needs_the_ticket_of_its_host(bench: Bench) -> None:
    ticket = bench.host()
    for request in (
        JoinRequest(Purpose.RANK, 1, os.urandom(16)),  # an invented ticket
        JoinRequest(Purpose.RANK, 3, ticket.ticket),  # a rank of another host
        JoinRequest(Purpose.RANK, 0, ticket.ticket),
    ):
        with join(bench.address, TOKEN, request) as connection:
            assert is_closed(connection)
    frames, kv = bench.rank(ticket, 1)
    until(lambda: 1 in bench.ranks)
    with join(bench.address, TOKEN, JoinRequest(Purpose.RANK, 1, ticket.ticket)) as again:
        assert is_closed(again)
    frames.close()
    kv.close()


@pytest.mark.parametrize("token", ["another secret", ""])
def test_a_host_without_the_token_is_refused(token: str, bench: Bench) -> None:
    with pytest.raises(ConfigError, match="another cluster_token"):
        join(bench.address, token, JoinRequest(Purpose.HOST))
    host, _, port = bench.address.partition(":")
    with socket.create_connection((host, int(port))) as noisy:
        noisy.sendall(b"\x01" * 4096)
        noisy.settimeout(10)
        with contextlib.suppress(ConnectionError):
            while noisy.recv(4096):  # until the connection has ended
                pass
    silent = [socket.create_connection((host, int(port))) for _ in range(20)]
    assert bench.host().host == 1, "silent ones delay nobody"
    for connection in silent:
        connection.close()


def test_a_host_refuses_a_rank_0_without_the_token() -> None:
    """It would get the model's prompts."""
    listener = socket.create_server(("127.0.0.1", 0))

    def impostor() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"TRNK\x01\x00" + bytes(32))
            connection.recv(4096)
            connection.sendall(os.urandom(32))
            connection.recv(1)

    posing = threading.Thread(target=impostor)
    posing.start()
    with pytest.raises(ConfigError, match="does not know"):
        join(f"127.0.0.1:{listener.getsockname()[1]}", TOKEN, JoinRequest(Purpose.HOST))
    posing.join(10)
    listener.close()


def test_a_recorded_handshake_cannot_be_used_again() -> None:
    """Each greeting has a nonce of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        recorded = b""
        for is_again in (False, True):
            with socket.create_connection(listener.getsockname()) as connection:
                accepted, _ = listener.accept()
                with accepted:
                    admitted = pool.submit(admit, accepted, TOKEN)
                    greeting = connection.recv(4096)
                    if not is_again:
                        body = joining._REQUEST.pack(Purpose.HOST, 0, bytes(16), bytes(32))
                        recorded = body + joining._proof(TOKEN, b"joins", greeting, body)
                    connection.sendall(recorded)
                    assert admitted.result(10) == (None if is_again else JoinRequest(Purpose.HOST))


def test_a_host_looks_up_the_name_of_rank_0_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Kubernetes it may stand for another pod a moment later, or be unknown."""
    look_up, names = socket.getaddrinfo, ["rank-0.test"]

    def look_up_once(host: str, *arguments: Any, **options: Any) -> Any:
        if host in names:
            names.remove(host)
            host = "127.0.0.1"
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up_once)
    monkeypatch.setattr(host, "start_rank", lambda _: subprocess.Popen(["true"]))
    settings = {
        "model": "/nowhere",
        "cluster_token": TOKEN,
        "instance": {"engine": {"tp": 2, "pp": 3}},
        "ranks": {"listen": bench.address.replace("127.0.0.1", names[0]), "per_host": HOSTS.per_host},
    }

    async def join_and_stop() -> None:
        ranks = host.RankHost(WorkerConfig.model_validate(settings))
        await ranks.start()
        until(lambda: len(bench.ranks) == 2)
        bench.hosts[0].send(FrameKind.STOP)
        await ranks.wait_closed()

    asyncio.run(join_and_stop())
    assert names == []
