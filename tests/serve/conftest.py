from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from bench.serve.client import Client
from mfmjt.pipeline import Pipeline
from mfmjt.serve.settings import Settings
from tests.clips import write_video
from tests.model_folder import write_model

Start = Callable[..., AbstractContextManager[Client]]


@pytest.fixture(scope="session")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """A complete model of random weights."""
    return Pipeline.from_pretrained(write_model(tmp_path_factory.mktemp("model")), device="cpu")


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A video of 1.2 s."""
    return write_video(tmp_path_factory.mktemp("clips") / "clip.mp4", frames=30).read_bytes()


@pytest.fixture(scope="session")
def start(pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """A server of its own for who asks; its folder is empty again afterwards."""
    for name in ("fastapi", "python_multipart", "prometheus_client"):
        pytest.importorskip(name, reason="serving needs the extra 'web'")
    uvicorn = pytest.importorskip("uvicorn", reason="serving needs the extra 'web'")
    from mfmjt.serve.api import create_app

    @contextlib.contextmanager
    def started(**options: Any) -> Iterator[Client]:
        options.setdefault("folder", tmp_path_factory.mktemp("run"))
        settings = Settings(port=0, **options)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            app = create_app(pipe, "random", settings)
            server = uvicorn.Server(
                uvicorn.Config(
                    app, log_level="error", http="h11", ws="none", timeout_graceful_shutdown=1
                )
            )
            thread = threading.Thread(target=server.run, args=([listener],))
            thread.start()
            try:
                client = Client(f"http://127.0.0.1:{listener.getsockname()[1]}/", settings.token)
                client.get("/healthz")  # answered once it has started
                yield client
            finally:
                server.should_exit = True
                thread.join(30)
        assert not thread.is_alive()
        assert list(settings.folder.iterdir()) == []

    return started


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the shared server keeps its files."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def server(start: Start, folder: Path) -> Iterator[Client]:
    """One server for many tests."""
    with start(folder=folder) as client:
        yield client
