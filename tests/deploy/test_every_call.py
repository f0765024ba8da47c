"""Every call of every gRPC port of a router, an instance and a controller: who is refused."""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx

from tandem import ClientTls
from tandem.core.api_keys import digest_of, new_key
from tandem.core.config import RouterConfig, ServeConfig, WorkerConfig
from tandem.core.instance_section import EngineSection, InstanceSection
from tandem.core.router_section import RouterSection
from tandem.core.tls import ClusterTls, PublicTls
from tandem.deploy.controller_server import serve_controller
from tandem.router.app import RouterApp
from tandem.worker.app import Worker
from tests.certificates import Authority, Certificate
from tests.intruder import SERVICES_OF, Port, all_services, methods_of
from tests.wire.test_controller import Handler

MODEL = Path(__file__).parents[2] / "models" / "tiny-python"
TOKEN, KEY, EXPIRED = "the-token-of-the-cluster", new_key(), new_key()
ANY_PORT = "127.0.0.1:0"


@dataclass(frozen=True)
class Secured:
    """`inside`: the authority of the cluster, `outside`: that of clients, `other_authority`: nobody's."""

    ports: tuple[Port, ...]
    router: RouterApp
    inside: Authority
    outside: Authority
    other_authority: Authority

    def files(self, server: Authority, own: Certificate | None) -> ClientTls:
        return ClientTls(server.ca, own and own.certificate, own and own.key)


@asynccontextmanager
async def secured_cluster(folder: Path) -> AsyncIterator[Secured]:
    """One process of each kind, in this one."""
    inside, outside, other_authority = (Authority(folder, name) for name in ("inside", "outside", "other"))
    node, front, peer, client = (
        inside.issue("node"),
        outside.issue("front"),
        inside.issue("peer"),
        outside.issue("client"),
    )
    cluster_tls = ClusterTls(certificate=node.certificate, key=node.key, ca=inside.ca)
    keys = folder / "keys.yaml"
    yesterday = (datetime.now(UTC) - timedelta(days=1)).isoformat()
    keys.write_text(
        f"keys:\n- {{name: a, tenant: a, sha256: '{digest_of(KEY)}'}}\n"
        f"- {{name: b, tenant: b, sha256: '{digest_of(EXPIRED)}', expires: '{yesterday}'}}\n"
    )
    section = RouterSection(
        http=ANY_PORT,
        grpc=ANY_PORT,
        control=ANY_PORT,
        api_keys=f"file:{keys}",
        tls=PublicTls(certificate=front.certificate, key=front.key, client_ca=outside.ca),
    )
    router = RouterApp(RouterConfig(model=MODEL, router=section, cluster_token=TOKEN, cluster_tls=cluster_tls))
    instance = InstanceSection(engine=EngineSection(device="cpu", threads=1, kv_memory=4 << 20))
    worker = Worker(
        WorkerConfig(model=MODEL, routers=(), instance=instance, cluster_token=TOKEN, cluster_tls=cluster_tls)
    )
    await router.start()
    await worker.start()
    config = ServeConfig(model=MODEL, cluster_token=TOKEN, cluster_tls=cluster_tls)
    as_peer = ClientTls(inside.ca, peer.certificate, peer.key)
    try:
        async with serve_controller(Handler(), config) as controller:
            ports = (
                Port("public", router.grpc_address, ClientTls(outside.ca, client.certificate, client.key), KEY),
                Port("control", router.control_address, as_peer, TOKEN),
                Port("instance", worker.address, as_peer, TOKEN),
                Port("controller", controller, as_peer, TOKEN),
            )
            yield Secured(ports, router, inside, outside, other_authority)
    finally:
        await worker.drain_and_stop(0.0)
        await router.drain_and_stop(0.0)


async def test_nobody_without_certificate_and_token_gets_in(tmp_path: Path) -> None:
    async with secured_cluster(tmp_path) as secured:
        for port in secured.ports:
            own, other = secured.inside, secured.outside
            if port.kind == "public":
                own, other = other, own
            wrong_files = (
                None,
                secured.files(own, None),
                secured.files(own, secured.other_authority.issue("foreign")),
                secured.files(own, own.issue("expired", is_expired=True)),
                secured.files(own, other.issue("of-the-other-side")),
            )
            await port.try_everything(wrong_files, (TOKEN if port.kind == "public" else KEY, EXPIRED, new_key()))
        # Of HTTP every path but those of a list needs a key: tests/router/test_api_keys.py.
        files = secured.outside.issue("http-client")
        context = ssl.create_default_context(cafile=str(secured.outside.ca))
        context.load_cert_chain(files.certificate, files.key)
        headers = {"authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(verify=context, headers=headers) as http:
            page = (await http.get(f"https://{secured.router.address}/metrics")).text
        for setting in ("router.tls", "cluster_tls"):
            assert f'tandem_certificate_not_after_timestamp_seconds{{certificate="{setting}"}} 1.' in page


def test_every_service_has_a_port() -> None:
    """The list of the descriptors is not empty, and each kind of port has its share of it."""
    listed = {method for kind in SERVICES_OF for method in methods_of(kind)}
    assert listed >= {method for methods in all_services().values() for method in methods}
    assert "/tandem.v1.InstanceService/Session*" in listed
    assert len(listed) > 20
