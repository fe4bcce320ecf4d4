"""Loads a model and serves it until the process is ended."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn

from mfmjt.errors import RunError
from mfmjt.pipeline import Pipeline
from mfmjt.serve.app import create_app
from mfmjt.serve.settings import Settings

__all__ = ["serve"]

CONNECTIONS = 256
"""Open connections at most; more are refused."""
_FAREWELL = 3  # seconds that open connections have at the end


def serve(settings: Settings, model: str, ready: Callable[[str], None], **options: Any) -> None:
    """Serve a model until the process is told to end.

    Args:
        settings: Limits and addresses.
        model: As for `Pipeline.from_pretrained`.
        ready: Called with the address once requests are answered.
        **options: As for `Pipeline.from_pretrained`, such as `device`.

    Raises:
        InputError: The model cannot be loaded.
        RunError: The address cannot be listened at.
    """
    listener = _listen(settings)
    with listener:
        pipeline = Pipeline.from_pretrained(model, **options)
        pipeline(prompt="warm")  # what is made at the first call is not waited for by a person
        port = listener.getsockname()[1]
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        app = create_app(pipeline, Path(model).name, settings)
        config = uvicorn.Config(
            app,
            log_level=logging.WARNING,
            access_log=False,
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=_FAREWELL,
            http="h11",
            ws="none",
            lifespan="on",
        )
        ready(f"http://{host}:{port}/")
        with contextlib.suppress(KeyboardInterrupt):  # the way to end a server
            uvicorn.Server(config).run(sockets=[listener])


def _listen(settings: Settings) -> socket.socket:
    """Open a socket before the model is loaded, so that an address in use is reported at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(256)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise RunError(
            f"Cannot listen at {settings.host}, port {settings.port}: {error.strerror}. Choose "
            "another --port or --host."
        ) from error
    return listener
