"""The guard before every request: who may ask, from where, and what browsers may do."""

from __future__ import annotations

import hmac
import ipaddress
import socket

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mfmjt.serve.settings import Settings, authority

__all__ = ["HEAD", "Guard", "is_local"]

HEAD = "mfmjt.head"
"""Key of the scope for whether the body of the answer is left out."""

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
_PORTS = {"http": 80, "https": 443}


def is_local(host: str) -> bool:
    """Return whether an address is this machine's own, which no other can reach."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """Refuses requests under foreign names, from foreign pages, or without the token.

    A page from elsewhere whose name was made to point here (DNS rebinding) sends that name as
    Host: only addresses and this machine's names pass. What changes something also passes only
    without Origin or with the server's own: the one it was reached under, or one that was given to
    it, since a proxy may send another Host than the browser did.

    The application sees one path and one method for each thing: whether or not a proxy left the
    root path out, without a slash at the end, and GET for HEAD.

    Args:
        app: What is guarded.
        settings: Its token, names and root path.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings
        self._given = {authority(name) for name in settings.names}
        own = {"localhost", settings.host.lower(), *(name for name, _ in self._given)}
        if not is_local(settings.host):
            own.add(socket.gethostname().lower())
        self._names = own - {""}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or answer it with a refusal."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # a WebSocket: closed without an answer

        root, asked = self._settings.root, scope["path"]
        path: str = asked.removeprefix(root) if asked.startswith(f"{root}/") else asked
        path = path.rstrip("/") or "/"

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                if path.startswith(_UNCACHED):
                    headers["Cache-Control"] = "no-store"
            await send(message)

        answer = self._refusal(scope["method"], path, Headers(scope=scope))
        if answer is None and root and asked == root:
            answer = RedirectResponse(f"{root}/", 308)  # the page's own addresses are below it
        if answer is not None:
            await answer(scope, receive, guarded)
            return
        seen = {"path": root + path, "root_path": root, HEAD: scope["method"] == "HEAD"}
        if seen[HEAD]:
            seen["method"] = "GET"
        await self._app({**scope, **seen}, receive, guarded)

    def _refusal(self, method: str, path: str, headers: Headers) -> Response | None:
        host = headers.get("host", "")
        name, _ = authority(host)
        if not self._known(name):
            given = f"[{name}]" if ":" in name else name[:100] or "NAME"
            return _refused(
                421,
                f"This server does not go by the name {host[:100]!r}, which the Host header says. "
                f"Use its address, or start it with --name {given}.",
            )
        if method not in ("GET", "HEAD", "OPTIONS"):
            if headers.get("sec-fetch-site", "none") in ("cross-site", "same-site"):
                return _refused(403, "The request comes from a page of another origin.")
            origin = headers.get("origin")
            if origin is not None and not self._own(origin, host):
                reason = f"The request comes from a page of another origin, {origin[:100]}"
                page = origin.partition("://")[2]
                if authority(page)[0]:
                    reason += (
                        f", and the Host header says {host[:100]}. If the page is this server's, "
                        f"behind a proxy, start the server with --name {page[:100]}"
                    )
                return _refused(403, f"{reason}.")
        token = self._settings.token
        if token is not None and path.startswith(("/v1/", "/metrics")):
            kind, _, given = headers.get("authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode(), token.encode())
            if kind.lower() != "bearer" or not same:
                return _refused(
                    401, "This server asks for a token. Send it as 'Authorization: Bearer …'."
                )
        return None

    def _known(self, name: str) -> bool:
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return address.is_loopback or not is_local(self._settings.host)

    def _own(self, origin: str, host: str) -> bool:
        """Return whether an Origin is the one that Host names, or one that was given."""
        scheme, _, asked = origin.lower().partition("://")
        if scheme not in _PORTS:
            return False

        def whole(name: str, port: int | None) -> tuple[str, int]:
            return name, port or _PORTS[scheme]

        page = authority(asked)
        given = {whole(*one) for one in self._given if one[1] is not None}
        return (
            whole(*page) in {whole(*authority(host)), *given}
            # Given without a port, it is trusted at any: proxies often take the port off Host.
            or (page[0], None) in self._given
        )


def _refused(status: int, reason: str) -> Response:
    headers = {"Connection": "close"}  # what the sender still has to say is not waited for
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"detail": reason}, status, headers)
