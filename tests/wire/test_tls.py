"""TLS between processes of a cluster: who is let in, and certificates that are renewed under running channels."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from tandem import AsyncClient, Client, ClientTls
from tandem.core.errors import ConfigError, UnavailableError
from tandem.core.tls import ClusterTls
from tandem.wire.channels import LastingChannel, open_channel
from tandem.wire.health import check_health
from tandem.wire.server import bind, build_server
from tandem.wire.server_tls import ServerTls
from tests.certificates import Authority, Certificate


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority")


@pytest.fixture
def other_authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "other")


def cluster(ca: Path, files: Certificate, server_name: str | None = None) -> ClusterTls:
    return ClusterTls(certificate=files.certificate, key=files.key, ca=ca, server_name=server_name)


@asynccontextmanager
async def serving(settings: ClusterTls) -> AsyncIterator[str]:
    tls = ServerTls.of_cluster(settings)
    tls.load()
    server, health = build_server("token")
    await health.set("", health_pb2.HealthCheckResponse.SERVING)
    address = bind(server, "127.0.0.1:0", tls)
    await server.start()
    reloading = asyncio.create_task(tls.reload_when_changed())
    try:
        yield address
    finally:
        reloading.cancel()
        await server.stop(None)


async def answers(address: str, tls: ClusterTls | None) -> bool:
    async with open_channel(address, tls=tls) as channel:
        return bool(await check_health(channel, 5.0))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_both_ends_need_a_certificate_of_the_cluster(authority: Authority, other_authority: Authority) -> None:
    async with serving(cluster(authority.ca, authority.issue("server"))) as address:
        assert await answers(address, cluster(authority.ca, authority.issue("peer")))
        assert not await answers(address, None), "no TLS"
        assert not await answers(address, cluster(authority.ca, other_authority.issue("foreign")))
        assert not await answers(address, cluster(authority.ca, authority.issue("expired", is_expired=True)))
        assert not await answers(address, cluster(other_authority.ca, authority.issue("peer"))), "the server is foreign"
        credentials = grpc.ssl_channel_credentials(authority.ca.read_bytes())
        async with grpc.aio.secure_channel(address, credentials) as channel:
            assert await check_health(channel, 5.0) is None, "no certificate"
    async with serving(cluster(authority.ca, authority.issue("server", is_expired=True))) as address:
        assert not await answers(address, cluster(authority.ca, authority.issue("peer")))


async def test_the_name_in_a_certificate(authority: Authority) -> None:
    named = authority.issue("server", hosts=("tandem.internal",))
    async with serving(cluster(authority.ca, named)) as address:
        peer = authority.issue("peer")
        assert not await answers(address, cluster(authority.ca, peer)), "it is not the address's"
        assert await answers(address, cluster(authority.ca, peer, "tandem.internal"))
        assert not await answers(address, cluster(authority.ca, peer, "elsewhere.internal"))


async def test_certificates_are_renewed_under_a_running_channel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All certificates, and the authority itself, as when the old one has ended."""
    monkeypatch.setattr("tandem.core.file_watch._LOOK_S", 0.01)
    caplog.set_level("INFO")
    first = Authority(tmp_path, "authority")
    server, peer = cluster(first.ca, first.issue("server")), cluster(first.ca, first.issue("peer"))
    async with serving(server) as address, LastingChannel(address, tls=peer) as channel:
        await asyncio.sleep(0.05)
        before = await channel.get()
        assert await check_health(before, 5.0)
        assert await channel.get() is before
        second = Authority(tmp_path, "authority")
        second.issue("server")
        second.issue("peer")
        await until(lambda: "has been read again" in caplog.text)
        assert not await answers(address, cluster(first.ca, first.issue("old-peer")))
        after = await channel.get()
        assert after is not before
        async with asyncio.timeout(10):
            while not await check_health(await channel.get(), 5.0):  # noqa: ASYNC110 - the server may read them later
                await asyncio.sleep(0.01)


def test_files_of_a_client(authority: Authority, tmp_path: Path) -> None:
    files = authority.issue("peer")
    with pytest.raises(ConfigError, match="go together"):
        Client(tls=ClientTls(certificate=files.certificate))
    with pytest.raises(ConfigError, match="cannot be read"):
        Client(tls=ClientTls(ca=tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot be read"):
        open_channel("127.0.0.1:1", tls=cluster(tmp_path / "none", files))


async def test_a_client_without_tls_gets_a_sentence(authority: Authority) -> None:
    async with serving(cluster(authority.ca, authority.issue("server"))) as address, AsyncClient(address) as client:
        with pytest.raises(UnavailableError):
            await client.models(timeout_s=5.0)
