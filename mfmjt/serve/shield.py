"""What stands before every request: who may ask, from where, and what browsers may do."""

from __future__ import annotations

import hmac
import ipaddress
import json
import socket
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mfmjt.serve.settings import Settings

__all__ = ["Shield", "is_local"]

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; media-src 'self' blob:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "X-Frame-Options": "DENY",
}
_UNCACHED = ("/v1/", "/metrics", "/healthz")


def is_local(host: str) -> bool:
    """Whether an address is this machine's own, which no other can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Shield:
    """Refuses requests under foreign names, from foreign pages, or without the token.

    A page from elsewhere whose name was made to point here (DNS rebinding) sends that name as
    Host: only addresses and this machine's names pass. What changes something also passes only
    without Origin or with the server's own.

    Args:
        app: What is guarded.
        settings: Its token and names.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        own = {"localhost", settings.host, *settings.names}
        if not is_local(settings.host):
            own.add(socket.gethostname())
        self._names = {name.lower() for name in own if name}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it with a refusal."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # a WebSocket: closed without an answer

        path: str = scope["path"]

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                if path.startswith(_UNCACHED):
                    headers["Cache-Control"] = "no-store"
            await send(message)

        refusal = self._refusal(scope["method"], path, Headers(scope=scope))
        if refusal is None:
            await self._app(scope, receive, guarded)
            return
        status, reason = refusal
        body = json.dumps({"detail": reason}).encode()
        sent = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        if status == 401:
            sent.append((b"www-authenticate", b"Bearer"))
        await guarded({"type": "http.response.start", "status": status, "headers": sent})
        await guarded({"type": "http.response.body", "body": body})

    def _refusal(self, method: str, path: str, headers: Headers) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if not self._known(_name(host)):
            return 421, (
                "This server does not go by the name in the Host header. Use its address, or start "
                "it with --name."
            )
        origin = headers.get("origin")
        if method not in ("GET", "HEAD", "OPTIONS"):
            foreign = origin is not None and urlsplit(origin).netloc.lower() != host.lower()
            if foreign or headers.get("sec-fetch-site", "none") in ("cross-site", "same-site"):
                return 403, "The request comes from a page of another origin."
        token = self._settings.token
        if token is not None and path.startswith(("/v1/", "/metrics")):
            kind, _, given = headers.get("authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode(), token.encode())
            if kind.lower() != "bearer" or not same:
                return 401, "This server asks for a token. Send it as 'Authorization: Bearer …'."
        return None

    def _known(self, name: str) -> bool:
        if name.lower() in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not is_local(self._settings.host)


def _name(host: str) -> str:
    """The name or address in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host
