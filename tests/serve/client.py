"""A client of the server made of the standard library, for loads and tests."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

__all__ = ["Answer", "Client", "form"]

_BOUNDARY = "------------------------5f3c8a77d1"


@dataclass(frozen=True)
class Answer:
    """An answer of the server.

    Attributes:
        status: HTTP's status.
        headers: With names in small letters.
        body: All of it.
        seconds: From the first byte sent to the last received.
    """

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float

    @property
    def json(self) -> Any:
        """The body, as JSON."""
        return json.loads(self.body)


def form(video: bytes | None, fields: dict[str, Any]) -> tuple[bytes, str]:
    """Body and content type of a multipart form."""
    parts = []
    for name, value in fields.items():
        for one in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
            parts.append(f'form-data; name="{name}"\r\n\r\n{one}'.encode())
    if video is not None:
        head = 'form-data; name="video"; filename="video"\r\nContent-Type: video/mp4\r\n\r\n'
        parts.append(head.encode() + video)
    mark = f"--{_BOUNDARY}\r\nContent-Disposition: ".encode()
    body = b"".join(mark + part + b"\r\n" for part in parts) + f"--{_BOUNDARY}--\r\n".encode()
    return body, f"multipart/form-data; boundary={_BOUNDARY}"


class Client:
    """Asks one server, each time over a new connection.

    Args:
        address: Such as http://127.0.0.1:8000/.
        token: Sent with every request, if given.
        timeout: Seconds without a byte after which an answer is given up.
    """

    def __init__(self, address: str, token: str | None = None, timeout: float = 60.0) -> None:
        parts = urlsplit(address)
        assert parts.hostname is not None
        self.host, self.port = parts.hostname, parts.port or 80
        self.headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self.timeout = timeout

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """One request and its answer."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout)
        begin = time.perf_counter()
        try:
            connection.request(method, path, body, self.headers | (headers or {}))
            got = connection.getresponse()
            said = got.read()
            named = {name.lower(): value for name, value in got.getheaders()}
            return Answer(got.status, named, said, time.perf_counter() - begin)
        finally:
            connection.close()

    def get(self, path: str) -> Answer:
        """The answer to GET."""
        return self.ask("GET", path)

    def generate(self, video: bytes | None = None, **fields: Any) -> Answer:
        """Ask for sound: a form with a video, JSON without one."""
        if video is None:
            body, kind = json.dumps(fields).encode(), "application/json"
        else:
            body, kind = form(video, fields)
        return self.ask("POST", "/v1/generate", body, {"Content-Type": kind})

    def wait(self, job: str, seconds: float = 60.0) -> dict[str, Any]:
        """The state of a job once it is over."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            state: dict[str, Any] = self.get(f"/v1/jobs/{job}").json
            if state["status"] in ("done", "failed", "cancelled"):
                return state
            time.sleep(0.03)
        raise TimeoutError(f"the job was not over after {seconds:g} s")
