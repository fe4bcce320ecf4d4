"""The page in a real browser, Debian's Chromium, driven by Playwright; behind nginx, too."""

from __future__ import annotations

import base64
import contextlib
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile

from tests.serve.client import Client
from tests.support.clips import packets, write_sound

playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("the page's tests need Chromium: apt-get install chromium", allow_module_level=True)

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-ui-for-media-stream",
    "--use-fake-device-for-media-stream",
)
PATIENCE = 30_000.0  # ms


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@contextlib.contextmanager
def opened(browser: Any, server: Client, at: str | None = None, **options: Any) -> Iterator[Any]:
    """The page, whose console stays silent and which asks nobody else for anything."""
    context = browser.new_context(**options)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    said: list[str] = []
    address = at or f"http://{server.host}:{server.port}"
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on(
        "request", lambda r: r.url.startswith((address, "blob:", "data:")) or said.append(r.url)
    )
    page.goto(address)
    page.wait_for_selector("body[data-ready]")
    page.said = said
    try:
        yield page
        assert [text for text in said if "Failed to load resource" not in text] == []
    finally:
        context.close()


@pytest.fixture
def page(browser: Any, server: Client) -> Iterator[Any]:
    with opened(browser, server) as found:
        yield found


def drop(page: Any, video: bytes, name: str = "clip.mp4") -> None:
    """Let a file fall on the page."""
    page.evaluate(
        """([bytes, name]) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], name, { type: "video/mp4" }));
            for (const kind of ["dragenter", "dragover", "drop"]) {
                document.body.dispatchEvent(
                    new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }),
                );
            }
        }""",
        [list(video), name],
    )


def made(page: Any) -> None:
    page.wait_for_selector("#result:not([hidden])")
    page.wait_for_selector("#working", state="hidden")


def seconds(page: Any) -> float:
    """Where the sound that is heard is."""
    return float(page.inner_text("#clock").split()[0])


def passes(page: Any, name: str, number: float) -> None:
    """Wait until the number that an element begins with is above this one."""
    until = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < until:
        found = re.match(r"[\d.]+", page.inner_text(name))
        if found and float(found[0]) > number:
            return
        time.sleep(0.02)
    raise TimeoutError(f"{name} says {page.inner_text(name)!r}")


def inked(page: Any, canvas: str) -> int:
    """Different colours on a canvas."""
    return page.evaluate(
        """(name) => {
            const canvas = document.querySelector(name);
            const { width, height } = canvas;
            const data = canvas.getContext("2d").getImageData(0, 0, width, height).data;
            return new Set(new Uint32Array(data.buffer)).size;
        }""",
        canvas,
    )


def test_drop_a_video_and_hear_its_sound(page: Any, clip: bytes) -> None:
    drop(page, clip)
    made(page)
    assert page.inner_text("#name") == "clip.mp4"
    assert inked(page, "#wave") > 1
    assert inked(page, "#spectrum") > 10
    assert "onsets detected" in page.inner_text("#legend")
    assert "Making the sound" in page.inner_text("#stages")
    assert page.locator("#candidates button").count() == 0
    before = seconds(page)
    page.click("#play")
    passes(page, "#clock", 0.3)
    assert seconds(page) > before
    assert page.get_attribute("#play", "aria-label") == "Pause"
    pictures = page.evaluate("document.querySelector('#picture').currentTime")
    assert pictures > 0
    page.wait_for_selector("#play[aria-label=Play]")  # it ends by itself


def test_upload_by_the_file_button_and_download(page: Any, clip: bytes, tmp_path: Path) -> None:
    page.set_input_files("#file", {"name": "a.mp4", "mimeType": "video/mp4", "buffer": clip})
    page.fill("#prompt", "a bell")
    page.fill("#seed", "7")
    page.click("#go")
    made(page)
    assert "seed 7" in page.inner_text("#legend")
    assert page.locator(".transport button").all_inner_texts()[1:] == ["WAV", "MP4", "MOV", "MKV"]
    for kind in ("wav", "mp4", "mkv"):
        with page.expect_download() as found:
            page.click(f"#{kind}")
        path = tmp_path / found.value.suggested_filename
        found.value.save_as(path)
        assert path.name == f"mfmjt-cfg_scaled-7.{kind}"
        if kind == "wav":
            assert soundfile.info(str(path)).duration == pytest.approx(1.2)
        else:
            source = tmp_path / "source.mp4"
            source.write_bytes(clip)
            assert packets(path, "video") == packets(source, "video")
            assert len(packets(path, "audio")) > 1


def test_a_prompt_alone(page: Any) -> None:
    page.fill("#duration", "1.5")
    page.fill("#prompt", "rain on a tin roof")
    page.press("#prompt", "Control+Enter")
    made(page)
    assert page.is_hidden("#picture")
    assert page.locator("#films button").count() == 0
    assert "/ 1.5 s" in page.inner_text("#clock")


def test_a_negative_prompt(page: Any) -> None:
    page.fill("#duration", "1")
    page.fill("#prompt", "a bell")
    page.fill("#negative", " music ")
    with page.expect_request("**/v1/generate") as sent:
        page.press("#negative", "Control+Enter")
    assert sent.value.post_data_json["negative_prompt"] == "music"
    made(page)
    page.locator("[name=mode][value=none] + span").click()
    page.click("#go")
    page.wait_for_selector("#error:not([hidden])")
    assert "A negative prompt is what guidance leads away from" in page.inner_text("#error")
    assert page.is_enabled("#go")


def test_candidates_and_ways_of_guidance_side_by_side(page: Any, clip: bytes) -> None:
    page.fill("#count", "2")
    page.locator("[name=mode][value=none] + span").click()
    drop(page, clip)
    made(page)
    cards = page.locator("#candidates [role=radio]")
    texts = cards.all_inner_texts()
    assert [re.findall(r"Seed (\d)|(Scaled|No) guidance", text) for text in texts] == [
        [("0", ""), ("", "Scaled")],
        [("1", ""), ("", "Scaled")],
        [("0", ""), ("", "No")],
        [("1", ""), ("", "No")],
    ]
    pictures = page.evaluate(
        "[...document.querySelectorAll('#candidates canvas')].map((c) => c.toDataURL())"
    )
    assert len(set(pictures)) == 4
    page.click("#play")
    passes(page, "#clock", 0.2)
    at = seconds(page)
    cards.nth(2).click()
    assert cards.nth(2).get_attribute("aria-checked") == "true"
    assert seconds(page) >= at  # the other sound goes on where this one was


def test_comparing_without_knowing(page: Any, clip: bytes) -> None:
    page.fill("#count", "3")
    drop(page, clip)
    made(page)
    page.click("#begin")
    assert page.is_hidden("#candidates")
    assert page.is_disabled("#wav")
    for vote in ("a", "b", "tie", "a"):
        hidden = page.inner_text("#stage")
        assert "Seed" not in hidden
        assert "seed" not in hidden
        page.click("#hear-a")
        assert page.get_attribute("#hear-a", "aria-pressed") == "true"
        page.click("#hear-b")
        page.click(f"[data-vote={vote}]")
    page.click("#reveal")
    rows = page.locator("#verdict tr").all_inner_texts()[1:]
    assert len(rows) == 3
    preferred, compared = zip(*(map(int, row.split("\t")[1:]) for row in rows), strict=True)
    assert sum(preferred) == 3  # the tie is nobody's
    assert sum(compared) == 8
    assert page.is_visible("#candidates")


def test_an_error_is_shown_and_the_page_goes_on(page: Any, clip: bytes, tmp_path: Path) -> None:
    drop(page, write_sound(tmp_path / "a.m4a").read_bytes(), "song.m4a")
    page.wait_for_selector("#error:not([hidden])")
    assert "only sound" in page.inner_text("#error")
    assert page.get_attribute("#error", "role") == "alert"
    assert page.is_enabled("#go")
    drop(page, clip)
    made(page)
    assert page.is_hidden("#error")
    page.click("#clear")
    page.click("#go")
    assert "say in the prompt" in page.inner_text("#error")


def test_by_the_keyboard_alone(page: Any) -> None:
    keys = page.keyboard

    def tab_to(name: str) -> None:
        for _ in range(40):
            keys.press("Tab")
            if page.evaluate("document.activeElement.id") == name:
                return
        raise AssertionError(f"{name} is not reached by Tab")

    tab_to("file")
    tab_to("prompt")
    keys.type("a wooden ball")
    tab_to("count")
    keys.press("ArrowUp")
    tab_to("duration")
    keys.type("2")
    tab_to("go")
    keys.press("Enter")
    made(page)
    assert page.evaluate("document.activeElement.id") == "play"
    keys.press("Space")
    passes(page, "#clock", 0.2)
    keys.press("Space")
    tab_to("timeline")
    keys.press("Home")
    assert seconds(page) == 0
    keys.press("ArrowRight")
    assert seconds(page) == 0.5
    keys.press("Tab")
    keys.press("ArrowRight")
    assert (
        page.locator("#candidates [aria-checked=true]")
        .get_attribute("aria-label")
        .startswith("Candidate 2")
    )
    keys.press("1")
    assert page.evaluate("document.querySelector('#candidates').children[0].ariaChecked") == "true"


def test_everything_that_can_be_used_has_a_name(page: Any, clip: bytes) -> None:
    page.fill("#count", "2")
    drop(page, clip)
    made(page)
    for role in ("button", "spinbutton", "slider", "checkbox", "radio", "textbox"):
        for found in page.get_by_role(role).all():
            name = found.aria_snapshot()
            assert re.search(r'"[^"]+"', name), name


def test_recording_from_the_camera(page: Any) -> None:
    page.click("#record")
    passes(page, "#elapsed", 0.8)
    page.click("#stop")
    page.wait_for_selector("#chosen:not([hidden])")
    page.click("#go")
    made(page)
    assert page.locator("#error").is_hidden()


def test_a_recording_that_mp4_does_not_hold(page: Any, tmp_path: Path) -> None:
    """What Firefox's MediaRecorder gives is VP8 in WebM; Chromium's gives it when asked."""
    recorded = page.evaluate(
        """async () => {
            const canvas = document.createElement("canvas");
            const context = canvas.getContext("2d");
            const paint = setInterval(() => {
                context.fillStyle = `hsl(${performance.now() / 5} 80% 50%)`;
                context.fillRect(0, 0, canvas.width, canvas.height);
            }, 40);
            const mimeType = "video/webm;codecs=vp8";
            const recorder = new MediaRecorder(canvas.captureStream(25), { mimeType });
            const parts = [];
            recorder.ondataavailable = (event) => parts.push(event.data);
            recorder.start();
            await new Promise((done) => setTimeout(done, 1200));
            await new Promise((done) => ((recorder.onstop = done), recorder.stop()));
            clearInterval(paint);
            const bytes = new Uint8Array(await new Blob(parts).arrayBuffer());
            return btoa(String.fromCharCode(...bytes));
        }"""
    )
    source = tmp_path / "recording.webm"
    source.write_bytes(base64.b64decode(recorded))
    drop(page, source.read_bytes(), "recording.webm")
    made(page)
    assert page.locator(".transport button").all_inner_texts()[1:] == ["WAV", "WebM", "MKV"]
    for kind in ("webm", "mkv"):
        with page.expect_download() as found:
            page.click(f"#{kind}")
        path = tmp_path / f"made.{kind}"
        found.value.save_as(path)
        # The sound may end before the last picture begins.
        assert len(packets(path, "video")) >= len(packets(source, "video")) - 2
        assert packets(path, "video") == packets(source, "video")[: len(packets(path, "video"))]
        assert len(packets(path, "audio")) > 1
    assert page.is_hidden("#error")


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ("location /foley/ { proxy_pass http://127.0.0.1:SERVER/; }", {}),
        (
            "location /foley { proxy_pass http://mfmjt; proxy_set_header Host $host; }",
            {"root_path": "/foley"},
        ),
        (
            "location = /foley { proxy_pass http://127.0.0.1:SERVER/; } "
            "location /foley/ { proxy_pass http://127.0.0.1:SERVER/; }",
            {"root_path": "/foley"},
        ),
    ],
    ids=["taken off", "kept", "without its slash"],
)
def test_behind_a_path_and_another_host(
    browser: Any, start: Any, proxy: Any, clip: bytes, rules: str, told: dict[str, str]
) -> None:
    name = "sound.localhost"  # which browsers look for on this machine
    with start(names=(name,), **told) as server, proxy(server, rules) as nginx:
        path = "/foley" if "= /foley" in rules else "/foley/"
        with opened(browser, nginx, f"http://{name}:{nginx.port}{path}") as page:
            drop(page, clip)
            made(page)
            for kind in ("wav", "mp4"):
                with page.expect_download() as found:
                    page.click(f"#{kind}")
                assert found.value.path().stat().st_size > 1000
            with page.expect_response(lambda answer: answer.request.method == "DELETE") as removed:
                page.click("#go")  # the first sound is not needed any more
            assert removed.value.status == 204
            made(page)
            large = bytes(2**20 + 1)  # more than nginx takes unless told otherwise
            file = {"name": "a.mp4", "mimeType": "video/mp4", "buffer": large}
            page.set_input_files("#file", file)
            page.click("#go")
            page.wait_for_selector("#error:not([hidden])")
            assert "client_max_body_size" in page.inner_text("#error")


def test_cancelling(page: Any, clip: bytes, server: Client) -> None:
    page.fill("#steps", "100")
    page.fill("#count", "8")
    for mode in ("cfg", "none"):
        page.locator(f"[name=mode][value={mode}] + span").click()
    drop(page, clip)
    page.wait_for_selector("#cancel:not([hidden])")
    page.click("#cancel")
    page.wait_for_selector("#working", state="hidden")
    until = time.monotonic() + PATIENCE / 1000
    while server.get("/healthz").json["busy"] and time.monotonic() < until:
        time.sleep(0.05)
    assert server.get("/healthz").json["busy"] == 0


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_light_dark_and_phone(browser: Any, server: Client, theme: str, clip: bytes) -> None:
    phone = {"width": 360, "height": 640}
    with opened(browser, server, color_scheme=theme, viewport=phone, has_touch=True) as page:
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        drop(page, clip)
        made(page)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= phone["width"]  # nothing to scroll sideways
        small = page.evaluate(
            """[...document.querySelectorAll("button, input[type=number], textarea")]
                .filter((e) => e.offsetParent && e.getBoundingClientRect().height < 30)
                .map((e) => e.id)"""
        )
        assert small == []
        page.click("#theme")
        other = {"light": "dark", "dark": "light"}[theme]
        assert page.evaluate("document.documentElement.dataset.theme") == other


def test_a_token_is_asked_once(browser: Any, start: Any, clip: bytes) -> None:
    with start(token="correct horse") as server:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"http://{server.host}:{server.port}")
        page.wait_for_selector("#secret[open]")
        page.fill("#token", "correct horse")
        page.keyboard.press("Enter")
        page.wait_for_selector("body[data-ready]")
        drop(page, clip)
        made(page)
        page.reload()
        page.wait_for_selector("body[data-ready]")
        assert not page.is_visible("#secret")
        context.close()


def test_an_example_is_one_click_away(page: Any) -> None:
    page.click("[data-example=bell]")
    made(page)
    assert "/ 8.0 s" in page.inner_text("#clock")
