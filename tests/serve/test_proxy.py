"""Behind a real nginx: paths that it maps, and the Host that it sends unless told otherwise."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.serve.client import Client, form

NAME = "sound.example"
MAPPED = "location /foley/ { proxy_pass http://127.0.0.1:SERVER/; }"
KEPT = "location /foley { proxy_pass http://127.0.0.1:SERVER; }"
WAYS = {
    # How the path and Host reach the server, and what the server is told.
    "a path that is taken off": (MAPPED, {}),
    "a path that is taken off and known": (MAPPED, {"root_path": "/foley"}),
    "a path that stays": (KEPT, {"root_path": "foley/"}),
    "Host without the port": (
        "location /foley/ { proxy_pass http://127.0.0.1:SERVER/; proxy_set_header Host $host; }",
        {},
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_all_of_the_api_behind_a_path(start: Any, proxy: Any, clip: bytes, way: str) -> None:
    rules, told = WAYS[way]
    with start(names=(NAME,), **told) as server, proxy(server, rules) as nginx:
        public = {"Host": f"{NAME}:{nginx.port}", "Origin": f"http://{NAME}:{nginx.port}"}

        def ask(method: str, path: str, body: Any = None, **headers: str) -> Any:
            return nginx.ask(method, f"/foley/{path}", body, public | headers)

        body, kind = form(clip, {"seed": 3})
        answer = ask("POST", "v1/generate", body, **{"Content-Type": kind})
        assert answer.status == 202, answer.body
        job = f"v1/jobs/{answer.json['id']}"
        events = ask("GET", f"{job}/events")
        assert events.headers["content-type"].startswith("text/event-stream")
        states = [json.loads(data) for data in re.findall(rb"data: (.*)\n", events.body)]
        assert states[-1]["status"] == "done"
        for kind in ("wav", "mp4", "json"):
            path = f"/{job}/sounds/0.{kind}"
            assert ask("GET", path[1:]).body == server.get(path).body
        schema = ask("GET", "openapi.json").json
        if told:
            assert answer.headers["location"] == f"/foley/{job}"
            assert schema["servers"] == [{"url": "/foley"}]
        assert ask("DELETE", job).status == 204
        assert server.get(f"/{job}").status == 404


def test_a_page_of_another_origin_is_told_how_to_be_this_ones(start: Any, proxy: Any) -> None:
    """With nginx's own Host no header tells the server its public name: it must be given."""
    with start() as server, proxy(server, MAPPED) as nginx:
        for origin, name in (
            (f"https://{NAME}", NAME),
            (f"http://{NAME}:{nginx.port}", f"{NAME}:{nginx.port}"),
            ("https://[::1]:8443", "[::1]:8443"),
        ):
            answer = nginx.ask("DELETE", "/foley/v1/jobs/x", headers={"Origin": origin})
            assert answer.status == 403
            assert f"--name {name}." in answer.json["detail"]
            with start(names=(name,)) as told, proxy(told, MAPPED) as other:
                answer = other.ask("DELETE", "/foley/v1/jobs/x", headers={"Origin": origin})
                assert answer.status == 404
        for foreign in ("null", "http://[", "https://", f"https://{NAME}/x"):
            answer = nginx.ask("DELETE", "/foley/v1/jobs/x", headers={"Origin": foreign})
            assert answer.status == 403
            assert "--name" not in answer.json["detail"]


def test_a_host_that_nginx_makes_of_its_upstream(start: Any, proxy: Any) -> None:
    rules = "location / { proxy_pass http://mfmjt; }"
    with start() as server, proxy(server, rules) as nginx:
        answer = nginx.get("/")
        assert answer.status == 421
        assert "--name mfmjt." in answer.json["detail"]
    with start(names=("mfmjt",)) as server, proxy(server, rules) as nginx:
        assert nginx.get("/").status == 200


def test_whose_page_asks(start: Any) -> None:
    for names, asked in {
        (): (
            ("http://localhost", "localhost:80", True),
            ("https://localhost", "localhost", True),
            ("https://localhost", "localhost:443", True),
            ("https://localhost", "localhost:80", False),
            ("http://localhost:3000", "localhost", False),
            ("http://localhost:3000", "localhost:8000", False),
        ),
        ("Sound.Example",): (
            ("https://SOUND.example", "127.0.0.1:8000", True),
            ("https://sound.example:8443", "sound.example", True),
            ("http://localhost:3000", "localhost:8000", False),
            ("https://other.example", "127.0.0.1:8000", False),
            ("https://sound.example.evil.example", "127.0.0.1:8000", False),
            ("https://evil.example@sound.example", "127.0.0.1:8000", False),
            ("https://evil.example/sound.example", "127.0.0.1:8000", False),
            ("file://sound.example", "127.0.0.1:8000", False),
            ("null", "127.0.0.1:8000", False),
        ),
        ("sound.example:8443", "localhost:3000", "other.example:443"): (
            ("https://sound.example:8443", "127.0.0.1:8000", True),
            ("https://sound.example:9000", "127.0.0.1:8000", False),
            ("https://sound.example", "127.0.0.1:8000", False),
            ("http://localhost:3000", "localhost", True),
            ("http://localhost:3001", "localhost", False),
            ("https://other.example", "127.0.0.1:8000", True),
        ),
    }.items():
        with start(names=names) as server:
            for origin, host, own in asked:
                headers = {"Origin": origin, "Host": host}
                answer = server.ask("DELETE", "/v1/jobs/none", headers=headers)
                assert answer.status == (404 if own else 403), (names, headers)
                headers["Sec-Fetch-Site"] = "cross-site"  # what no page of its own is
                assert server.ask("DELETE", "/v1/jobs/none", headers=headers).status == 403


def test_a_token_is_asked_under_the_root_path_too(start: Any) -> None:
    with start(token="correct horse", root_path="/foley") as server:
        stranger = Client(f"http://{server.host}:{server.port}/")
        for path in ("/v1/models", "/metrics", "/v1/models/", "/metrics/"):
            for root in ("", "/foley"):
                answer = stranger.get(root + path)
                assert answer.status == 401
                assert answer.headers["cache-control"] == "no-store"
                assert server.get(root + path).status == 200
        assert server.get("/foley/foley/v1/models").status == 404
        moved = server.get("/foley")
        assert (moved.status, moved.headers["location"]) == (308, "/foley/")
