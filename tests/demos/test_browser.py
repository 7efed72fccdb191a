"""The page in a real browser: upload, ask, compare; nothing comes from outside."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

pytestmark = pytest.mark.browser

SWITCHES = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE = 60_000  # milliseconds


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no Chromium found; on Debian: apt-get install chromium")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, headless=True, args=SWITCHES)
        yield chromium
        chromium.close()


def test_a_visit(browser: Any, page: str, picture: Path, tmp_path: Path) -> None:
    requested: list[str] = []
    complaints: list[str] = []
    tab = browser.new_page(viewport={"width": 1280, "height": 1000})
    tab.set_default_timeout(PATIENCE)
    tab.on("request", lambda request: requested.append(request.url))
    tab.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))

    tab.goto(page, wait_until="load")
    tab.wait_for_selector("#go")
    tab.set_input_files("#image input[type=file]", str(picture))
    tab.wait_for_selector("#image img")
    tab.fill("#q textarea", "what color is the shape?")
    tab.click("#policy input")
    tab.get_by_role("option", name="random").click()
    tab.fill("#keep input[type=number]", "0.25")
    tab.keyboard.press("Tab")
    tab.click("#go")
    tab.wait_for_selector("#overlay img")
    tab.wait_for_function("document.querySelector('#dense textarea').value.length > 0")
    assert tab.input_value("#pruned textarea")
    cells = tab.inner_text("#table")
    assert "pruned" in cells and "196" in cells and "49" in cells
    width = tab.evaluate("document.querySelector('#overlay img').naturalWidth")
    assert width == 448
    tab.screenshot(path=str(tmp_path / "page.png"), full_page=True)

    # An example fills image and question, though its file was temporary.
    tab.click("#examples tbody tr")
    tab.wait_for_function("document.querySelector('#q textarea').value !== 'what color is the shape?'")
    tab.wait_for_function("document.querySelector('#image img').naturalWidth === 224")

    # Bad input shows its reason.
    tab.fill("#q textarea", "")
    tab.click("#go")
    tab.wait_for_selector("text=The question is empty")

    outside = [url for url in requested if not is_local(url)]
    assert not outside
    assert not complaints


def is_local(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("data", "blob") or parts.hostname in ("127.0.0.1", "localhost")
