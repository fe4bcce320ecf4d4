"""The application: the API, the page, and the guard before both."""

from __future__ import annotations

import asyncio
import contextlib
import mimetypes
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from mfmjt.pipeline import Pipeline
from mfmjt.serve.examples import EXAMPLES
from mfmjt.serve.guard import Guard
from mfmjt.serve.routes import router
from mfmjt.serve.schema import asked_schema
from mfmjt.serve.service import Service
from mfmjt.serve.settings import Settings

__all__ = ["create_app"]

PAGE = Path(__file__).with_name("page")


def create_app(pipeline: Pipeline, name: str, settings: Settings) -> FastAPI:
    """Build the application that a server such as uvicorn runs.

    Args:
        pipeline: Makes the sounds; nothing else may use it meanwhile.
        name: What the model is called.
        settings: Limits and addresses.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = Service(pipeline, name, settings)
        await service.start()
        app.state.service = service
        try:
            yield
        finally:
            await service.close()

    app = FastAPI(
        title="mfmjt",
        version="1",
        description="Sound for video and text.",
        lifespan=lifespan,
        docs_url=None,  # those pages load scripts from elsewhere
        redoc_url=None,
    )
    app.include_router(router)
    _add_page(app, settings.root)
    _add_faults(app)
    app.add_middleware(Guard, settings=settings)
    published = app.openapi

    def openapi() -> dict[str, Any]:
        schema = published()
        schema["paths"]["/v1/generate"]["post"]["requestBody"] = {
            "required": True,
            "content": {
                kind: {"schema": asked_schema(settings, video, form)}
                for kind, video, form in (
                    ("application/json", False, False),
                    ("application/x-www-form-urlencoded", False, True),
                    ("multipart/form-data", True, True),
                )
            },
        }
        if settings.token is not None:
            schema["components"]["securitySchemes"] = {
                "token": {"type": "http", "scheme": "bearer"}
            }
            schema["security"] = [{"token": []}]
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _add_page(app: FastAPI, root: str) -> None:
    """Serve the page's files, which are read once: no path of a request is ever opened.

    Their addresses are relative, so that the page works under any path. Where its own path is shown
    without a slash at the end they would lead elsewhere: `root` stands before them for that.
    """
    files = {
        path.name: (path.read_bytes(), mimetypes.guess_type(path.name)[0] or "text/plain")
        for path in PAGE.iterdir()
        if path.is_file()
    }
    if root:
        content, kind = files["index.html"]
        files["index.html"] = content.replace(b'="page/', f'="{root}/page/'.encode()), kind

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return page("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        return page(name)

    @app.get("/examples/{name}.mp4", include_in_schema=False)
    async def example(request: Request, name: str) -> Response:
        if name not in EXAMPLES:
            raise HTTPException(404, "There is no such example.")
        path = await asyncio.to_thread(request.app.state.service.examples.path, name)
        return FileResponse(path, media_type="video/mp4")

    def page(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "There is no such page.")
        content, kind = files[name]
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})


def _add_faults(app: FastAPI) -> None:
    """Answer every error with a `Fault`."""

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"detail": error.detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def misspelt(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse({"detail": f"{place}: {first['msg']}."}, 422)
