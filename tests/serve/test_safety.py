from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mfmjt.errors import InputError, RunError
from mfmjt.serve.jobs import Run
from mfmjt.serve.settings import Settings
from tests.serve.client import Client, form
from tests.serve.hostile import crafted, mutated

PATIENCE = 5.0  # seconds within which a hostile file is refused
RUN = "import sys; sys.path[:0] = {path!r}; from mfmjt.cli import main; main()"


def children() -> set[str]:
    """Processes that this one has started and that still run."""
    found: set[str] = set()
    for listed in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError):  # its thread has just ended
            found.update(listed.read_text().split())
    return found


# --- hostile files -----------------------------------------------------------------------------


def test_files_made_to_do_harm_are_refused(server: Client, clip: bytes, folder: Path) -> None:
    before = set(folder.rglob("*"))
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.01)
        for name, data in crafted(trap.getsockname()[1], scale=32).items():
            answer = server.generate(data)
            assert answer.seconds < PATIENCE, name
            if answer.status == 202:  # decoders make something of it, within the limits
                assert name in ("frames that change their size",)
                assert server.wait(answer.json["id"])["status"] == "done"
                server.ask("DELETE", f"/v1/jobs/{answer.json['id']}")
            else:
                assert (answer.status, bool(answer.json["detail"])) == (422, True), name
        with pytest.raises(TimeoutError):
            trap.accept()
    assert set(folder.rglob("*")) == before
    assert server.generate(clip).status == 202


@pytest.mark.parametrize("seed", range(4))
def test_damaged_clips_are_refused_or_played(server: Client, clip: bytes, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(5):
        name, data = mutated(clip, rng)
        answer = server.generate(data)
        assert answer.seconds < PATIENCE, name
        assert answer.status in (202, 422), (name, answer.body)
        if answer.status == 202:
            assert server.wait(answer.json["id"])["status"] == "done"
            server.ask("DELETE", f"/v1/jobs/{answer.json['id']}")


def test_reading_is_bounded_in_time(start: Any, tmp_path: Path, clip: bytes) -> None:
    before = children()  # those of other tests in this process
    with start(read_seconds=0.01, folder=tmp_path) as server:
        answer = server.generate(clip)
        assert answer.status == 422
        assert "within 0.01 s" in answer.json["detail"]
        assert list(tmp_path.glob("*/job-*")) == []
    assert children() <= before


def test_reading_is_bounded_in_memory(start: Any, clip: bytes) -> None:
    with start(memory=2**20) as server:
        answer = server.generate(clip)
        assert answer.status == 422
        assert answer.json["detail"]
        assert server.get("/healthz").status == 200


def test_the_process_that_reads_has_no_secret(
    start: Any, clip: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file cannot learn the token: what opens it was not told."""
    monkeypatch.setenv("MFMJT_TOKEN", "a secret of the server")
    with start(token="a secret of the server") as server:
        before = children()
        thread = threading.Thread(target=lambda: server.generate(clip))
        thread.start()
        seen = b""
        while thread.is_alive():
            for child in children() - before:
                with contextlib.suppress(OSError):
                    # Until it is another program, it is this one and was told the same.
                    program = Path(f"/proc/{child}/cmdline").read_bytes()
                    told = Path(f"/proc/{child}/environ").read_bytes()
                    seen = told if b"mfmjt.serve.sandboxed" in program and told else seen
        thread.join()
        assert seen
        assert b"TOKEN" not in seen
        assert b"a secret" not in seen


# --- hostile clients ---------------------------------------------------------------------------


def test_too_large_is_said_before_it_is_sent(start: Any) -> None:
    with start(max_upload=1000) as server:
        body, kind = form(bytes(200_000), {})
        answer = server.ask("POST", "/v1/generate", body, {"Content-Type": kind})
        assert answer.status == 413
        assert "larger than" in answer.json["detail"]


def test_a_body_without_an_end(start: Any, tmp_path: Path) -> None:
    kind = form(b"", {})[1]
    with start(max_upload=2**20, folder=tmp_path) as server:
        head = form(b"\0", {})[0].rpartition(b"\0")[0]

        def body() -> Iterator[bytes]:
            yield head
            for _ in range(10_000):
                yield bytes(65_536)

        connection = http.client.HTTPConnection(server.host, server.port, timeout=PATIENCE)
        begin = time.perf_counter()
        try:
            connection.request(
                "POST", "/v1/generate", body(), {"Content-Type": kind}, encode_chunked=True
            )
            status = connection.getresponse().status
        except (ConnectionError, TimeoutError):  # closed while this side was still sending
            status = 413
        finally:
            connection.close()
        assert status == 413
        assert time.perf_counter() - begin < PATIENCE
        assert list(tmp_path.glob("*/job-*")) == []
        assert b'status="413"' in server.get("/metrics").body


def test_a_client_that_falls_silent(start: Any, tmp_path: Path) -> None:
    with start(body_seconds=0.2, folder=tmp_path) as server:
        body, kind = form(bytes(1000), {})
        with socket.create_connection((server.host, server.port), PATIENCE) as sock:
            head = f"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
            sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:100])
            assert sock.recv(100).startswith(b"HTTP/1.1 408")
        assert list(tmp_path.glob("*/job-*")) == []


def test_a_client_that_goes_away_while_its_file_is_read(
    start: Any, clip: bytes, tmp_path: Path
) -> None:
    before = children()
    with start(folder=tmp_path) as server:
        body, kind = form(clip, {})
        for sent in (len(body) // 2, len(body)):
            with socket.create_connection((server.host, server.port), PATIENCE) as sock:
                head = f"POST /v1/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
                sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:sent])
                time.sleep(0.05)
        until = time.monotonic() + PATIENCE
        while server.get("/healthz").json["busy"] and time.monotonic() < until:
            time.sleep(0.02)
        assert server.get("/healthz").json["busy"] == 0
        assert list(tmp_path.glob("*/job-*")) == []
    assert children() <= before


# --- who may ask -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:8000", 200),
        ("[::1]:8000", 200),
        ("evil.example", 421),
        ("localhost.evil.example", 421),
        ("192.168.0.7", 421),  # not on a server that listens to this machine alone
        ("", 421),
    ],
)
def test_only_under_its_own_name(server: Client, host: str, status: int) -> None:
    assert server.ask("GET", "/healthz", headers={"Host": host}).status == status


def test_names_that_were_given(start: Any) -> None:
    with start(names=("sound.example",)) as server:
        assert server.ask("GET", "/healthz", headers={"Host": "sound.example"}).status == 200
        assert server.ask("GET", "/healthz", headers={"Host": "other.example"}).status == 421


def test_no_page_of_another_origin_changes_anything(server: Client) -> None:
    own = f"{server.host}:{server.port}"
    for headers, status in (
        ({"Origin": f"http://{own}"}, 404),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 404),
    ):
        assert server.ask("DELETE", "/v1/jobs/none", headers=headers).status == status, headers
    answer = server.ask("OPTIONS", "/v1/generate", headers={"Origin": "http://evil.example"})
    assert not any(name.startswith("access-control") for name in answer.headers)


def test_a_token_is_asked_of_all_that_tells_something(start: Any, clip: bytes) -> None:
    with start(token="correct horse battery") as server:
        assert server.generate(clip).status == 202
        stranger = Client(f"http://{server.host}:{server.port}/")
        for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic eDp5"}):
            for path in ("/v1/models", "/v1/jobs/x", "/metrics"):
                answer = stranger.ask("GET", path, headers=wrong)
                assert answer.status == 401
                assert answer.headers["www-authenticate"] == "Bearer"
        assert stranger.generate(clip).status == 401
        assert stranger.get("/").status == 200
        assert stranger.get("/healthz").status == 200


def test_headers_that_bind_browsers(server: Client) -> None:
    for path in ("/", "/page/app.js", "/v1/models", "/nothing"):
        headers = server.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
    page = Path(__file__).parents[2] / "mfmjt" / "serve" / "page"
    for file in page.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text, file
        assert "https:" not in text.replace("over https.", ""), file


# --- files that are left -----------------------------------------------------------------------


def test_what_a_dead_run_left_is_removed_and_what_lives_is_not(tmp_path: Path) -> None:
    alive = Run(tmp_path)
    dead = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os, sys; from pathlib import Path; from mfmjt.serve.jobs import Run;"
            "run = Run(Path(sys.argv[1])); (run.folder / 'left').write_bytes(b'x'); os._exit(1)",
            str(tmp_path),
        ],
        check=False,
    )
    assert dead.returncode == 1
    (tmp_path / "mfmjt-serve-not-a-run").mkdir()
    (tmp_path / "mfmjt-serve-link").symlink_to(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    new = Run(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        alive.folder.name, new.folder.name, "mfmjt-serve-not-a-run", "mfmjt-serve-link",
    }  # fmt: skip
    alive.close()
    new.close()
    assert {path.name for path in tmp_path.iterdir()} == {
        "mfmjt-serve-not-a-run",
        "mfmjt-serve-link",
    }


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_the_command_serves_until_it_is_told_to_end(
    tmp_path: Path, clip: bytes, end: signal.Signals
) -> None:
    pytest.importorskip("uvicorn", reason="serving needs the extra 'web'")
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", RUN.format(path=sys.path), "serve", "--port", "0"),
            *("--name", "sound.example", "--root-path", "/foley"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path), "MFMJT_TOKEN": "correct horse"},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("Serving nano at http://127.0.0.1:")
    server = Client(line.split()[-1], "correct horse")
    answer = server.generate(clip)
    assert answer.status == 202
    assert answer.headers["location"].startswith("/foley/v1/jobs/")
    assert server.ask("GET", "/foley/", headers={"Host": "sound.example"}).status == 200
    assert "server" not in answer.headers
    assert list(tmp_path.glob("mfmjt-serve-*/job-*"))
    process.send_signal(end)
    out, errors = process.communicate(timeout=30)
    assert (out, errors) == ("", "")
    assert list(tmp_path.glob("mfmjt-serve-*")) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_duration": 0}, "max_duration"),
        ({"max_duration": 1e6}, "at most 600"),
        ({"workers": 0}, "workers"),
        ({"port": 70_000}, "port"),
        ({"token": "short"}, "too short"),
        ({"token": "no header carries ü"}, "ASCII"),
        ({"names": ("https://sound.example/",)}, "no host name"),
        ({"names": ("",)}, "no host name"),
        ({"root_path": "https://sound.example/foley"}, "root path"),
        ({"root_path": "/v1"}, "the server's own"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Settings(**options)


def test_a_port_that_is_taken() -> None:
    pytest.importorskip("uvicorn", reason="serving needs the extra 'web'")
    from mfmjt.serve.server import serve

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RunError, match=f"port {port}"):
            serve(Settings(port=port), "nano", print, device="cpu")
