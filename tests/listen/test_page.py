"""The page in a real browser, Debian's Chromium: what it saves can be analysed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mfmjt.listen import KINDS, analyse, build
from tests.listen.test_build import sounds

playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("the page's tests need Chromium: apt-get install chromium", allow_module_level=True)

CLIPS = tuple(f"clip{i}" for i in range(6))
PATIENCE = 30_000.0  # ms


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--autoplay-policy=no-user-gesture-required"],
        )
        yield found
        found.close()


@pytest.mark.parametrize("kind", KINDS)
def test_answered_by_keyboard(browser: Any, tmp_path: Path, kind: str) -> None:
    folders = {
        "a": sounds(tmp_path / "one", CLIPS, 0.2),
        "b": sounds(tmp_path / "two", CLIPS, 0.4),
    }
    built = build(folders, tmp_path / "test.html", kind)
    context = browser.new_context(accept_downloads=True, viewport={"width": 390, "height": 844})
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on(
        "request", lambda r: r.url.startswith(("file:", "data:", "blob:")) or said.append(r.url)
    )
    page.goto(built.page.as_uri())
    page.wait_for_selector("body[data-ready]")
    page.keyboard.press("Enter")
    for number in range(len(CLIPS)):
        page.wait_for_selector(f"h1:has-text('{number + 1} of')")
        assert page.locator("#next").is_disabled()
        for i in range(page.locator("button.play").count()):
            page.keyboard.press(str(i + 1))
        if kind == "rating":
            for slider in page.locator("input[type=range]").all():
                slider.fill("70")
        else:
            page.keyboard.press("a")
        page.keyboard.press("Enter")
        if number == 2:  # closed and opened again, it goes on
            page.reload()
    page.wait_for_selector("#save")
    # No wider than a phone.
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    with page.expect_download() as download:
        page.click("#save")
    answers = tmp_path / "answers.json"
    download.value.save_as(answers)
    context.close()
    assert said == []
    result = analyse([answers], built.key)
    assert (result.kind, result.raters, result.answers) == (kind, 1, len(CLIPS))
