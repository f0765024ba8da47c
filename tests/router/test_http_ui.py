"""The page /ui over HTTP: its files, the state that it reads, and what bounds them."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from tandem.core.api_keys import digest_of, new_key
from tandem.core.clock import ManualClock
from tandem.core.config import RouterConfig
from tandem.core.errors import InvalidRequestError
from tandem.core.plan import Plan, PlanGroup
from tandem.core.replanning import DriftState, ReplanStatus
from tandem.core.session import Role
from tandem.router.app import RouterApp
from tandem.router.records import RequestLog
from tandem.router.ui.cluster_view import ClusterView
from tandem.router.ui.recent_requests import MAX_RECORDS
from tandem.wire.channels import open_channel
from tandem.wire.fleet import describe_fleet, report_plan, report_replan
from tests.instance_status import make_status
from tests.router.fakes import make_cluster
from tests.router.grpc_workers import serve_pair
from tests.router.test_app import PROMPT, TOKEN, make_config, wait_for_pair
from tests.router.test_recent_requests import CHAT, make_record

PLAN = Plan(
    model="tiny",
    verdict="colocate",
    summary="Two of both.",
    groups=(PlanGroup(role="colocated", instances=2, device="cpu", kv_tokens=100),),
)
STATIC = Path(__file__).parents[2] / "router" / "ui" / "static"


@asynccontextmanager
async def running_router(config: RouterConfig) -> AsyncIterator[httpx.AsyncClient]:
    app = RouterApp(config)
    await app.start()
    try:
        async with (
            httpx.AsyncClient(base_url=f"http://{app.address}", timeout=20) as http,
            serve_pair(app.control_address, "tiny", TOKEN),
        ):
            await wait_for_pair(http)
            yield http
    finally:
        await app.drain_and_stop(0.0)


async def test_shows_instances_requests_and_plan(checkpoint: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(PLAN.model_dump_json())  # JSON is YAML
    config = make_config(checkpoint)
    config = config.model_copy(update={"router": config.router.model_copy(update={"plan": plan})})
    async with running_router(config) as http:
        assert (await http.post("/v1/completions", json=PROMPT | {"model": "other"})).status_code == 404
        done = await http.post("/v1/completions", json=PROMPT)
        assert done.status_code == 200, done.text
        response = await http.get("/ui/state")
        assert response.headers["content-type"] == "application/json"
        state = response.json()
        assert state["early_refusals"] == {"model_not_found": 1}
        assert [(each["id"], each["role"], each["is_usable"]) for each in state["instances"]] == [
            ("decode-1", "decode", True),
            ("prefill-1", "prefill", True),
        ]
        assert (state["plan"]["summary"], state["plan"]["groups"][0]["instances"]) == ("Two of both.", 2)
        (latest,) = (await http.get("/ui/requests")).json()
        assert latest["instances"] == [["prefill-1", "decode-1"]]
        assert {(flow["source"], flow["target"]) for flow in state["recent"]["flows"]} == {
            ("router", "prefill-1"),
            ("prefill-1", "decode-1"),
        }
        explanation = await http.get("/ui/requests", params={"id": latest["request_id"]})
        assert "decode on decode-1:" in explanation.json()["text"]
        unknown = await http.get("/ui/requests", params={"id": "<b>"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")

        page = await http.get("/ui")
        files = re.findall(r'(?:src|href)="(ui/[^"]*)"', page.text)
        assert "ui/main.js" in files
        for path in ["/ui", "/ui/state", *(f"/{name}" for name in files), *(f"/ui/{f.name}" for f in STATIC.iterdir())]:
            response = await http.get(path)
            assert response.status_code == 200, path
            assert response.headers["content-security-policy"].startswith("default-src 'none'"), path
            assert response.headers["x-content-type-options"] == "nosniff"
            assert "unsafe" not in response.headers["content-security-policy"]
        assert (await http.head("/ui")).status_code == 200
        assert (await http.post("/ui/state")).status_code == 405
        with_slash = await http.get("/ui/")
        assert (with_slash.status_code, with_slash.headers["location"]) == (308, "../ui")
        for name in ("../config.py", "..%2fconfig.py", "main.py"):
            assert (await http.get(f"/ui/{name}")).status_code == 404, name


async def shown_plan(http: httpx.AsyncClient) -> str | None:
    """The summary of the plan that is shown from now on: the state is computed once a second."""
    first = (await http.get("/ui/state")).json()["uptime_s"]
    async with asyncio.timeout(10):
        while True:
            state = (await http.get("/ui/state")).json()
            if state["uptime_s"] != first:
                return None if state["plan"] is None else str(state["plan"]["summary"])
            await asyncio.sleep(0.05)


async def test_the_plan_is_what_the_controller_says_last(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.router.ui.cluster_view._KEPT_S", 0.0)
    app = RouterApp(make_config(checkpoint))
    await app.start()
    try:
        async with (
            httpx.AsyncClient(base_url=f"http://{app.address}", timeout=20) as http,
            open_channel(app.control_address, TOKEN) as channel,
        ):
            assert await shown_plan(http) is None
            for summary in ("The first.", "The second."):
                await report_plan(channel, PLAN.model_copy(update={"summary": summary}).model_dump_json(), 5.0)
                assert await shown_plan(http) == summary
            with pytest.raises(InvalidRequestError, match="no plan that this router can read"):
                await report_plan(channel, "{}", 5.0)
            await report_replan(channel, ReplanStatus(DriftState.STABLE), 5.0)
            await report_plan(channel, "", 5.0)
            assert await shown_plan(http) is None
            assert (await describe_fleet(channel, 5.0)).replan is None, "it was of the plan before"
    finally:
        await app.drain_and_stop(0.0)


async def test_with_api_keys_only_their_holders_see_the_cluster(checkpoint: Path, tmp_path: Path) -> None:
    keys = {"alice": new_key(), "bob": new_key(), "gateway": new_key()}
    lines = (
        f"  - {{name: {name}, tenant: {name}, sha256: {digest_of(key)!r}, names_tenants: {name == 'gateway'}}}\n"
        for name, key in keys.items()
    )
    path = tmp_path / "keys.yaml"
    path.write_text("keys:\n" + "".join(lines))
    config = make_config(checkpoint)
    config = config.model_copy(update={"router": config.router.model_copy(update={"api_keys": f"file:{path}"})})
    as_alice, as_bob, as_gateway = ({"authorization": f"Bearer {key}"} for key in keys.values())
    async with running_router(config) as http:
        done = await http.post("/v1/completions", json=PROMPT, headers=as_alice)
        assert done.status_code == 200
        for page in ("/ui", "/ui/main.js"):
            assert (await http.get(page)).status_code == 200
        for data in ("/ui/state", "/ui/requests", "/ui/requests?id=x", "/ui/none.js"):
            assert (await http.get(data)).status_code == 401, data
        assert (await http.get("/ui/state", headers=as_bob)).json()["recent"]["requests"] == 1
        seen = [await http.get("/ui/requests", headers=each) for each in (as_alice, as_bob, as_gateway)]
        assert [len(answer.json()) for answer in seen] == [1, 0, 1]
        query = {"id": seen[0].json()[0]["request_id"]}
        explained = [
            (await http.get("/ui/requests", params=query, headers=each)).status_code
            for each in (as_alice, as_bob, as_gateway)
        ]
        assert explained == [200, 404, 200]


async def test_can_be_switched_off_and_a_lost_plan_does_not_matter(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(checkpoint)
    lost = config.router.model_copy(update={"plan": tmp_path / "none.yaml"})
    async with running_router(config.model_copy(update={"router": lost})) as http:
        assert (await http.get("/ui/state")).json()["plan"] is None
    assert "/ui shows no plan" in caplog.text
    off = config.router.model_copy(update={"ui": False})
    async with running_router(config.model_copy(update={"router": off})) as http:
        for path in ("/ui", "/ui/state", "/ui/main.js"):
            assert (await http.get(path)).status_code == 404, path


def test_the_state_is_bounded_and_computed_once_a_second() -> None:
    clock = ManualClock(1000.0)
    cluster = make_cluster(clock=clock)
    for number in range(500):
        cluster.report(
            make_status(f"d{number:03}", Role.DECODE, address=f"10.0.0.1:{number + 1}", running_requests=number)
        )
    cluster.report(make_status("<script>alert(1)</script>", Role.DECODE, address="10.0.0.1:999"))
    log = RequestLog()
    view = ClusterView(
        model="tiny",
        dispatcher=cluster.dispatcher,
        log=log,
        classes=(CHAT,),
        plan=lambda: None,
        replan=lambda: None,
        clock=clock,
    )
    for number in range(3000):
        log.finished(replace(make_record(ended_ago_s=0.0), request_id=f"r{number}"))
    state = view.state()
    fields = json.loads(state)
    assert len(fields["instances"]) == 200
    assert fields["roles"][1] == fields["roles"][1] | {"role": "decode", "instances": 501, "usable": 0}
    assert fields["recent"]["requests"] == MAX_RECORDS
    assert len(state) < 200_000
    latest = view.latest(None)
    assert json.loads(latest)[0]["request_id"] == "r2999"
    assert len(latest) < 50_000
    assert view.state() is state
    clock.advance(1.0)
    assert json.loads(view.state())["uptime_s"] == 1.0


def test_files_load_nothing_from_elsewhere_and_make_no_html_of_strings() -> None:
    """What a browser shows is tested in tests/browser; this holds for each line."""
    assert {path.suffix for path in STATIC.iterdir()} == {".html", ".css", ".js", ".svg"}
    for path in STATIC.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        for word in ("http://", "https://", "//cdn", "@import", "url("):
            assert word not in text, (path.name, word)
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
            assert word not in text, (path.name, word)
        if path.suffix == ".html":
            assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=", text), path.name
