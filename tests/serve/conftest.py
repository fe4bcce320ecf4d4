from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from mfmjt.pipeline import Pipeline
from mfmjt.serve.settings import Settings
from tests.serve.client import Client

Start = Callable[..., AbstractContextManager[Client]]
Proxy = Callable[[Client, str], AbstractContextManager[Client]]
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
CONFIGURATION = """
daemon off; master_process off; pid pid; error_log stderr error;
events {{}}
http {{
  access_log off;
  client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
  uwsgi_temp_path uwsgi; scgi_temp_path scgi;
  upstream mfmjt {{ server 127.0.0.1:{server}; }}
  server {{
    listen 127.0.0.1:{port};
    {rules}
  }}
}}
"""


@pytest.fixture(scope="session")
def pipe(model_folder: Path) -> Pipeline:
    """A complete model of random weights."""
    return Pipeline.from_pretrained(model_folder, device="cpu")


@pytest.fixture(scope="session")
def clip(clip: Path) -> bytes:
    """A video of 1.2 s."""
    return clip.read_bytes()


@pytest.fixture(scope="session")
def start(pipe: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """A server of its own for who asks; its folder is empty again afterwards."""
    for name in ("fastapi", "python_multipart", "prometheus_client"):
        pytest.importorskip(name, reason="serving needs the extra 'web'")
    uvicorn = pytest.importorskip("uvicorn", reason="serving needs the extra 'web'")
    from mfmjt.serve.app import create_app

    @contextlib.contextmanager
    def started(**options: Any) -> Iterator[Client]:
        options.setdefault("folder", tmp_path_factory.mktemp("run"))
        pipeline = options.pop("pipeline", pipe)
        settings = Settings(port=0, **options)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            app = create_app(pipeline, "random", settings)
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


@pytest.fixture
def proxy(tmp_path: Path) -> Proxy:
    """An nginx of its own before a server, by rules that name that `127.0.0.1:SERVER` or `mfmjt`.

    Its settings are nginx's own but for those rules.
    """
    if NGINX is None:
        pytest.skip("proxies' tests need nginx: apt-get install nginx-light")

    @contextlib.contextmanager
    def started(server: Client, rules: str) -> Iterator[Client]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        rules = rules.replace("SERVER", str(server.port))
        (tmp_path / "nginx.conf").write_text(
            CONFIGURATION.format(server=server.port, port=port, rules=rules)
        )
        nginx = subprocess.Popen(
            [NGINX, "-p", str(tmp_path), "-c", "nginx.conf", "-e", "stderr"],
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            for _ in range(200):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                assert nginx.poll() is None
                time.sleep(0.02)
            yield Client(f"http://127.0.0.1:{port}/")
        finally:
            nginx.terminate()
            said = nginx.communicate(timeout=10)[1]
        assert [line for line in said.splitlines() if "[emerg]" in line] == []

    return started
