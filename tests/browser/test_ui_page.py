"""The page /ui in a real browser: what it shows, its use by keyboard and on a phone, and that no string of a request or
an instance becomes HTML. Needs Chromium and Playwright (CONTRIBUTING.md); without them it is skipped."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tandem.client import AsyncClient
from tandem.core.api_keys import digest_of, new_key
from tandem.core.session import Role
from tandem.router.app import RouterApp
from tandem.wire.channels import open_channel
from tandem.wire.fleet import report_plan, send_heartbeat
from tests.instance_status import make_status
from tests.router.front import write_checkpoint
from tests.router.grpc_workers import serve_pair
from tests.router.test_app import TOKEN, make_config
from tests.router.test_http_ui import PLAN

playwright = pytest.importorskip("playwright.async_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]

OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
HTML = '<img src=x onerror="document.title=1"><script>document.title=2</script>'


@asynccontextmanager
async def running_router(folder: Path, **settings: Any) -> AsyncIterator[RouterApp]:
    config = make_config(write_checkpoint(folder))
    app = RouterApp(config.model_copy(update={"router": config.router.model_copy(update=settings)}))
    await app.start()
    try:
        async with serve_pair(app.control_address, "tiny", TOKEN):
            yield app
    finally:
        await app.drain_and_stop(0.0)


@asynccontextmanager
async def open_page(url: str, *, status: str = "live: ", **context: Any) -> AsyncIterator[Any]:
    """/ui in a new browser. At the end no script may have failed, and nothing may have been asked of another server."""
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        page = await (await browser.new_context(**context)).new_page()
        page.set_default_timeout(20_000)
        troubles: list[str] = []
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda message: troubles.append(message.text) if is_trouble(message) else None)
        page.on("request", lambda request: None if request.url.startswith(url) else troubles.append(request.url))
        await page.goto(f"{url}/ui")
        await playwright.expect(page.locator("#connection")).to_contain_text(status)
        yield page
        await browser.close()
        assert not troubles


def is_trouble(message: Any) -> bool:
    """Statuses that a test has asked for are errors to the browser's console, too."""
    return message.type == "error" and not message.text.startswith("Failed to load resource")


async def generate(app: RouterApp, request_id: str) -> None:
    async with AsyncClient(app.grpc_address) as client:
        await client.generate(prompt="hello", max_tokens=9, ignore_eos=True, request_id=request_id)


async def test_strings_of_requests_and_instances_stay_text(tmp_path: Path) -> None:
    async with running_router(tmp_path) as app:
        async with open_channel(app.control_address, TOKEN) as channel:
            status = make_status(HTML, Role.DECODE, model="tiny", address="127.0.0.1:1")
            await send_heartbeat(channel, status, 5.0)
        async with open_page(f"http://{app.address}") as page:
            await generate(app, HTML)
            await playwright.expect(page.locator("#request-list .id").first).to_have_text(HTML)
            await page.locator("#request-list button").first.click()
            await playwright.expect(page.locator("#request-list pre").first).to_contain_text("decode on decode-1:")
            assert await page.title() == "tiny · Tandem"
            assert await page.locator("main img, main script").count() == 0


async def test_the_plan_changes_under_an_open_page(tmp_path: Path) -> None:
    async with running_router(tmp_path) as app, open_page(f"http://{app.address}") as page:
        await playwright.expect(page.locator("#plan-content")).to_contain_text("serves no plan")
        async with open_channel(app.control_address, TOKEN) as channel:
            for summary in ("The first.", "The second."):
                await report_plan(channel, PLAN.model_copy(update={"summary": summary}).model_dump_json(), 5.0)
                await playwright.expect(page.locator("#plan-content")).to_contain_text(summary)
        await playwright.expect(page.locator("#plan-content table")).to_contain_text("colocated")


async def test_by_keyboard(tmp_path: Path) -> None:
    async with running_router(tmp_path) as app, open_page(f"http://{app.address}") as page:
        await generate(app, "one")
        await playwright.expect(page.locator("#request-list li")).to_have_count(1)
        await page.keyboard.press("Tab")
        await playwright.expect(page.locator(".skip")).to_be_focused()
        reached = set()
        for _ in range(60):
            await page.keyboard.press("Tab")
            reached.add(await page.evaluate("document.activeElement.id || document.activeElement.className"))
            if await page.evaluate("document.activeElement.matches('#request-list button')"):
                await page.keyboard.press("Enter")
                break
        await playwright.expect(page.locator("#request-list button")).to_have_attribute("aria-expanded", "true")
        await playwright.expect(page.locator("#request-list pre")).to_be_visible()
        assert {"pause", "only-bad"} <= reached
        await asyncio.sleep(2.5)  # the page is drawn again; what is open and has the focus stays
        await playwright.expect(page.locator("#request-list button")).to_be_focused()
        await page.locator("#pause").press("Space")
        await playwright.expect(page.locator("#connection")).to_contain_text("paused")


async def test_prompt_is_answered_and_the_loss_of_the_router_is_seen(tmp_path: Path) -> None:
    async with running_router(tmp_path) as app, open_page(f"http://{app.address}") as page:
        await page.locator("#prompt").fill("hello")
        await page.locator("#max-tokens").fill("9")
        await page.locator("#send").click()
        await playwright.expect(page.locator("#try-status")).to_contain_text("9 tokens, TTFT")
        assert await page.locator("#answer").text_content()
        await page.route("**/ui/state", lambda route: route.fulfill(status=503, json={"error": {"message": "full"}}))
        await playwright.expect(page.locator("#connection")).to_contain_text("No answer from the router")
        await page.unroute("**/ui/state")
        await playwright.expect(page.locator("#connection")).to_contain_text("live: ")


async def test_asks_for_a_key_where_there_is_one(tmp_path: Path) -> None:
    key, file = new_key(), tmp_path / "keys.yaml"
    file.write_text(f"keys: [{{name: me, tenant: me, sha256: {digest_of(key)!r}}}]")
    async with (
        running_router(tmp_path, api_keys=f"file:{file}") as app,
        open_page(f"http://{app.address}", status="an API key is needed") as page,
    ):
        await playwright.expect(page.locator("#key")).to_be_focused()
        await page.keyboard.type(new_key())
        await page.keyboard.press("Enter")
        await playwright.expect(page.locator("#key-error")).to_have_text("This server does not know the API key.")
        await page.keyboard.type(key)
        await page.keyboard.press("Enter")
        await playwright.expect(page.locator("#key-form")).to_be_hidden()
        await playwright.expect(page.locator("#connection")).to_contain_text("live: ")
        await page.locator("#prompt").fill("hello")
        await page.locator("#send").click()
        await playwright.expect(page.locator("#try-status")).to_contain_text("tokens, TTFT")


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_on_a_phone(tmp_path: Path, scheme: str) -> None:
    context = {"viewport": {"width": 360, "height": 740}, "color_scheme": scheme, "has_touch": True}
    async with running_router(tmp_path) as app, open_page(f"http://{app.address}", **context) as page:
        await generate(app, "a-request-with-a-very-long-name-" * 4)
        await playwright.expect(page.locator("#request-list li")).to_have_count(1)
        assert await page.evaluate("document.documentElement.scrollWidth") <= 360
        background = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 27, 34)"}[scheme]
