"""A plan's report on a phone. Needs Chromium and Playwright (CONTRIBUTING.md); without them it is skipped."""

import shutil
from pathlib import Path

import pytest

from tandem.placement.report import write_report
from tests.placement.planned import BATCH, CHAT, planned

playwright = pytest.importorskip("playwright.async_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")]

OPTIONS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
PHONE = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}


async def test_the_report_is_readable_on_a_phone(tmp_path: Path) -> None:
    write_report(planned(classes=(CHAT, BATCH)), tmp_path / "plan.html")
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        page = await (await browser.new_context(**PHONE)).new_page()
        await page.goto((tmp_path / "plan.html").as_uri())
        widths = await page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert widths[0] <= widths[1], "the page is wider than the phone"
        advice = page.locator(".advice li")
        assert await advice.count() == 5
        for index in range(5):
            box = await advice.nth(index).bounding_box()
            assert box is not None
            assert 0 <= box["x"] < box["x"] + box["width"] <= 360
        size = await advice.first.evaluate("element => parseFloat(getComputedStyle(element).fontSize)")
        assert size >= 14
        assert await page.locator("header .advice").count() == 1, "it comes before everything else"
        await browser.close()
