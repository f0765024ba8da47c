"""A cluster with TLS and keys everywhere: every port and every call, with every kind of wrong certificate and token."""

import asyncio
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tandem import Client, ClientTls
from tandem.core.api_keys import digest_of, new_key
from tandem.core.errors import TandemError, UnauthenticatedError
from tandem.core.session import Role
from tandem.core.tls import ClusterTls
from tests.certificates import Authority, Certificate
from tests.cluster.harness import Cluster, running_cluster
from tests.intruder import Port

pytestmark = pytest.mark.slow  # the parts have quick tests: tests/wire/test_tls.py, tests/router/test_api_keys.py

KEY = new_key()


@dataclass(frozen=True)
class Secured:
    cluster: Cluster
    authority: Authority
    other_authority: Authority
    peer: Certificate

    def ports(self) -> list[Port]:
        own, cluster = self.files(self.peer), self.cluster
        return [
            Port("public", cluster.grpc_address, own, KEY),
            Port("control", cluster.control_address, own, Cluster.TOKEN),
            *(Port("instance", status.address, own, Cluster.TOKEN) for status in cluster.instances()),
        ]

    def files(self, own: Certificate | None) -> ClientTls:
        return ClientTls(self.authority.ca, own and own.certificate, own and own.key)


@pytest.fixture(scope="module")
def secured(built_in_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    authority, other_authority = Authority(folder, "authority"), Authority(folder, "other")
    server, peer = authority.issue("server"), authority.issue("peer")
    keys = folder / "keys.yaml"
    keys.write_text(f"keys: [{{name: alice-1, tenant: alice, sha256: '{digest_of(KEY)}'}}]\n")
    context = ssl.create_default_context(cafile=str(authority.ca))
    context.load_cert_chain(peer.certificate, peer.key)
    with running_cluster(
        built_in_model,
        folder,
        decode_transports=("gloo",),
        router={
            "api_keys": f"file:{keys}",
            "tls": {
                "certificate": str(server.certificate),
                "key": str(server.key),
                "client_ca": str(authority.ca),
            },
        },
        cluster_tls=ClusterTls(certificate=server.certificate, key=server.key, ca=authority.ca),
        http_options={"verify": context, "headers": {"authorization": f"Bearer {KEY}"}},
    ) as cluster:
        yield Secured(cluster, authority, other_authority, peer)


async def test_every_call_of_every_port_needs_certificate_and_token(secured: Secured) -> None:
    """In this process, and with a controller: tests/deploy/test_every_call.py."""
    foreign = secured.files(secured.other_authority.issue("foreign"))
    expired = secured.files(secured.authority.issue("expired", is_expired=True))
    ports = await asyncio.to_thread(secured.ports)
    assert len(ports) == 4
    for port in ports:
        other = Cluster.TOKEN if port.kind == "public" else KEY
        await port.try_everything((None, secured.files(None), foreign, expired), (other,))


def test_http_needs_certificate_and_key(secured: Secured) -> None:
    body = {"model": secured.cluster.model.name, "prompt": "def f(", "max_tokens": 4}
    url = f"{secured.cluster.url}/v1/completions"
    answer = httpx.post(url, json=body, timeout=30, **secured.cluster.http_options)
    assert answer.status_code == 200
    verify = secured.cluster.http_options["verify"]
    assert httpx.post(url, json=body, verify=verify).status_code == 401
    assert httpx.post(url, json=body, verify=verify, headers={"authorization": "Bearer x"}).status_code == 401
    without = ssl.create_default_context(cafile=str(secured.authority.ca))
    with pytest.raises(httpx.TransportError):
        httpx.post(url, json=body, verify=without, headers=secured.cluster.http_options["headers"])
    assert secured.cluster.metric("tandem_tenant_requests_total", tenant="alice", outcome="length") >= 1


def test_requests_pass_through_it(secured: Secured) -> None:
    """Prefill, KV over its control channel with TLS, decode; and a certificate that is renewed meanwhile."""
    tls = ClientTls(secured.authority.ca, secured.peer.certificate, secured.peer.key)
    with Client(secured.cluster.grpc_address, api_key=KEY, tls=tls) as client:
        before = client.generate(prompt="def read_json(path):", max_tokens=20, temperature=0)
        assert before.usage.completion_tokens == 20
        secured.authority.issue("server")
        secured.cluster.start_worker("decode-9", Role.DECODE, transport="gloo")
        secured.cluster.wait_ready(1, 2)
        again = [client.generate(prompt="def read_json(path):", max_tokens=20, temperature=0) for _ in range(8)]
        assert {answer.text for answer in again} == {before.text}
    used = [status.instance_id for status in secured.cluster.instances() for link in status.links if link.transfers]
    assert any(name.startswith("decode-9-") for name in used), used
    with Client(secured.cluster.grpc_address, tls=tls) as client, pytest.raises(UnauthenticatedError):
        client.generate(prompt="a")
    with Client(secured.cluster.grpc_address, api_key=KEY) as client, pytest.raises(TandemError):
        client.models(timeout_s=5.0)


def test_no_secret_is_seen(secured: Secured) -> None:
    """In no process list, no log and no file that others may read, of those that the processes write."""
    for name, process in secured.cluster.processes.items():
        shown = Path(f"/proc/{process.pid}/cmdline").read_bytes() + Path(f"/proc/{process.pid}/environ").read_bytes()
        log = secured.cluster.log_path(name).read_bytes()
        for secret in (Cluster.TOKEN, KEY):
            assert secret.encode() not in shown, name
            assert secret.encode() not in log, name
