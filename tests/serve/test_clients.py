"""Requests as clients put them: curl, requests, .NET, Java, browsers' own forms, PowerShell."""

from __future__ import annotations

import asyncio
import codecs
import http.client
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from mfmjt.serve.settings import Settings
from tests.serve.client import Answer, Client

MULTIPART = "multipart/form-data; boundary=x"
FORM = "application/x-www-form-urlencoded"


def parts(*given: tuple[str, bytes]) -> bytes:
    """A form's body, of headers and content each."""
    body = b"".join(
        b"--x\r\n" + head.encode() + b"\r\n\r\n" + content + b"\r\n" for head, content in given
    )
    return body + b"--x--\r\n"


def read(body: bytes, kind: str = MULTIPART) -> tuple[Any, bytes | None]:
    """What the server understands of a body: fields and file."""
    reader = pytest.importorskip("mfmjt.serve.body", reason="serving needs the extra 'web'")
    from starlette.requests import Request

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    request = Request({"type": "http", "headers": [(b"content-type", kind.encode())]}, receive)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asked, has_video = asyncio.run(reader.read_request(request, folder, Settings()))
        return asked, (folder / reader.UPLOAD).read_bytes() if has_video else None


def post(server: Client, body: bytes, kind: str = MULTIPART) -> Answer:
    return server.ask("POST", "/v1/generate", body, {"Content-Type": kind})


def dropped(server: Client, answer: Answer) -> dict[str, Any]:
    """The state of a job that was taken, which is then removed."""
    assert answer.status == 202, answer.body
    assert server.ask("DELETE", answer.headers["location"]).status == 204
    return answer.json


VIDEO = 'Content-Disposition: form-data; name="video"'


def test_the_part_video_is_the_file(clip: bytes) -> None:
    more = ('Content-Disposition: form-data; name="seed"', b"3")
    for head in (
        f"{VIDEO}; filename*=utf-8''Bogenfl%C3%B6te.mp4",  # requests over urllib3 1
        f"{VIDEO}; filename=\"=?utf-8?B?w7Y=?=\"; filename*=utf-8''%C3%B6.mp4",  # .NET
        "Content-Disposition: form-data; name=video; filename=clip.mp4",
        "content-disposition: form-data; Name=video; FileName=clip.mp4",
        "CONTENT-DISPOSITION: Form-Data; filename=clip.mp4; name=video",
        VIDEO,  # no name of a file
        f"{VIDEO}\r\nContent-Type: video/mp4\r\nContent-Length: 3",
        f'{VIDEO}; filename=""',
        f'{VIDEO}; filename="a \\"b\\"; name=\\"steps.mp4"',
        f'{VIDEO}; filename="a\\\\"',
        f'{VIDEO}; filename="Bogenflöte; 弓.mp4"',
        f'{VIDEO}; filename="C:\\clips\\a.mp4"\r\nContent-Transfer-Encoding: binary',
    ):
        for body in (parts((head, clip), more), parts(more, (head, clip))):
            asked, video = read(body)
            assert (asked.seed, video) == (3, clip), head


def test_content_types_of_forms(clip: bytes) -> None:
    for kind in (
        'multipart/form-data; boundary="x"',
        "Multipart/Form-Data; charset=utf-8; Boundary=x",
    ):
        assert read(b"\r\n" + parts((VIDEO, clip)), kind)[1] == clip, kind


def test_empty_fields_are_not_there(server: Client, clip: bytes) -> None:
    """A browser's form sends all of its fields."""
    names = ("prompt", "negative_prompt", "steps", "guidance", "guidance_mode", "seed", "count",
             "duration")  # fmt: skip
    empty = [(f'Content-Disposition: form-data; name="{name}"', b" ") for name in names]
    state = server.wait(post(server, parts(*empty, (VIDEO, clip))).json["id"])
    assert state["status"] == "done", state
    (sound,) = state["sounds"]
    assert (sound["seed"], sound["duration"]) == (0, pytest.approx(1.2))
    seed = 'Content-Disposition: form-data; name="seed"'
    assert post(server, parts((VIDEO, clip), (seed, b""), (seed, b"3"))).status == 202
    nothing = (f'{VIDEO}; filename=""\r\nContent-Type: application/octet-stream', b"")
    prompt = ('Content-Disposition: form-data; name="prompt"', b"rain")
    assert not dropped(server, post(server, parts(nothing, prompt)))["video"]
    answer = post(server, parts(nothing, *empty))
    assert (answer.status, answer.json["detail"][:7]) == (422, "prompt:")
    answer = post(server, parts((f'{VIDEO}; filename="a.mp4"', b""), prompt))
    assert (answer.status, answer.json["detail"]) == (422, "video: the file is empty.")


def test_text_that_comes_as_a_file(server: Client, clip: bytes) -> None:
    """`curl -F prompt=@prompt.txt`, a Blob in a browser; numbers as Python writes them."""
    head = 'Content-Disposition: form-data; name="%s"; filename="blob"\r\nContent-Type: text/plain'
    given = {"prompt": codecs.BOM_UTF8 + b"Regen", "count": b"2.0", "seed": b" 7 "}
    answer = post(server, parts((VIDEO, clip), *((head % n, v) for n, v in given.items())))
    state = server.wait(answer.json["id"])
    assert [sound["seed"] for sound in state["sounds"]] == [7, 8]
    answer = post(server, parts((head % "clip", clip), (head % "prompt", b"x")))
    says = "clip: there is no such field. That of the file is video."
    assert (answer.status, answer.json["detail"]) == (422, says)
    for wrong in (b"2.5", b"1_0", b"0x2", b"two"):
        assert post(server, parts((VIDEO, clip), (head % "count", wrong))).status == 422


def test_content_types_and_marks_of_json(server: Client) -> None:
    asked = {"prompt": "rain \N{CLOUD}", "duration": 0.2}
    for kind in (
        "application/json",
        "application/json; charset=utf-8",
        'Application/JSON;charset="UTF-8"',
        "application/vnd.api+json",
        "application/problem+json",
        "text/json",
    ):
        # PowerShell and some editors begin a file with a mark of its order.
        for order in ("utf-8", "utf-8-sig", "utf-16"):
            body = json.dumps(asked, ensure_ascii=False).encode(order)
            dropped(server, post(server, body, kind))


def test_json_that_cannot_be(server: Client) -> None:
    for body, status in (
        (b'{"prompt": "x", "seed": 1, "seed": 2}', 400),
        (b'{"prompt": "\xfc"}', 400),  # Latin-1
        (b'{"prompt": "\xed\xa0\x80"}', 422),  # half of a pair
        (b'{"prompt": "\\ud800"}', 422),
        (codecs.BOM_UTF8, 400),
        (b"", 400),
    ):
        answer = post(server, body, "application/json")
        assert answer.status == status, body
        assert answer.json["detail"]


def test_a_form_of_text_alone(server: Client) -> None:
    """`curl -d prompt=rain`, `requests.post(data=...)`."""
    for body in (b"prompt=rain+on+tin&duration=0.2&seed=&count=2", "prompt=Flöte&steps=".encode()):
        state = server.wait(post(server, body, FORM).json["id"])
        assert state["status"] == "done"
        assert len(state["sounds"]) == (2 if b"count" in body else 1)
    for body, status, says in (
        (b"seed=3", 422, "prompt: "),
        (b"prompt=x&seed=3&seed=4", 422, "twice"),
        (b"prompt=x&video=/etc/passwd", 422, "video: there is no such field"),
        (b"prompt=%FF", 400, "cannot be read"),
        (b"prompt=\xff", 400, "cannot be read"),
        (b'{"prompt": "rain"}', 415, "application/json"),  # curl -d without a header
        (b"prompt=" + b"x" * 70_000, 413, "larger"),
    ):
        answer = post(server, body, FORM)
        assert answer.status == status, body
        assert says in answer.json["detail"]


def test_head_is_get_without_its_body(server: Client, clip: bytes) -> None:
    job = server.generate(clip).json["id"]
    server.wait(job)
    for path in (
        "/", "/page/app.js", "/healthz", "/v1/models", "/openapi.json",
        f"/v1/jobs/{job}", f"/v1/jobs/{job}/events", f"/v1/jobs/{job}/sounds/0.json",
        f"/v1/jobs/{job}/sounds/0.wav", f"/v1/jobs/{job}/sounds/0.mkv", "/metrics", "/nothing",
        f"/v1/jobs/{job}/sounds/1.wav",
    ):  # fmt: skip
        connection = http.client.HTTPConnection(server.host, server.port, timeout=10)
        connection.request("HEAD", path)
        head = connection.getresponse()
        assert head.read() == b""
        connection.close()
        whole = server.get(path)
        assert head.status == whole.status, path
        told = {name.lower(): value for name, value in head.getheaders()}
        changes = {"date", "content-length"} if path == "/metrics" else {"date"}
        assert {k: v for k, v in told.items() if k not in changes} == {
            k: v for k, v in whole.headers.items() if k not in changes
        }, path
    assert server.ask("HEAD", "/v1/generate").status == 405


def test_head_of_events_is_no_listener(start: Any) -> None:
    """A link checker that looks at the stream neither waits for its end nor ends the work."""
    with start(grace=0) as server:
        job = server.generate(prompt="x", duration=9, steps=100, count=8).json["id"]
        answer = server.ask("HEAD", f"/v1/jobs/{job}/events")
        assert answer.headers["content-type"].startswith("text/event-stream")
        state = server.get(f"/v1/jobs/{job}").json
        assert state["status"] in ("queued", "running")


def test_a_slash_at_the_end(server: Client) -> None:
    assert server.get("/v1/models/").json == server.get("/v1/models").json
    assert server.get("//").status == 200
    answer = server.ask(
        "POST", "/v1/generate/", b'{"prompt": "x"}', {"Content-Type": "application/json"}
    )
    dropped(server, answer)


def test_curl(server: Client, clip: bytes, tmp_path: Path) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("needs curl")
    (tmp_path / "clip.mp4").write_bytes(clip)
    (tmp_path / "prompt.txt").write_text("a bell")
    (tmp_path / "body.json").write_bytes(codecs.BOM_UTF8 + b'{"prompt": "a bell"}')
    address = f"http://{server.host}:{server.port}/v1/generate"
    for options in (
        ["-F", "video=@clip.mp4", "-F", "prompt=<prompt.txt", "-F", "seed="],
        ["-F", 'video=@clip.mp4;filename="a\\"b.mp4"', "-F", "prompt=@prompt.txt"],
        ["-F", "video=<clip.mp4"],
        ["-d", "prompt=a bell"],
        ["--data-urlencode", "prompt@prompt.txt"],
        ["-H", "Content-Type: application/json", "--data-binary", "@body.json"],
    ):
        done = subprocess.run(
            [curl, "-sS", "-f", *options, address], cwd=tmp_path, capture_output=True, check=False
        )
        assert done.returncode == 0, (options, done.stderr)
        server.ask("DELETE", f"/v1/jobs/{json.loads(done.stdout)['id']}")
