"""The application: every endpoint around one engine."""

from collections.abc import Sequence as Seq
from pathlib import Path

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from starlette.responses import FileResponse, HTMLResponse

import mini_infer
from mini_infer.engine import AsyncLLMEngine
from mini_infer.serving.admission import Admission
from mini_infer.serving.chat import chat_router
from mini_infer.serving.completions import completions_router
from mini_infer.serving.errors import add_error_handlers
from mini_infer.serving.events import EngineEvents
from mini_infer.serving.metrics import Metrics
from mini_infer.serving.middleware import BoundBody, RequireKey
from mini_infer.serving.operations import operations_router
from mini_infer.serving.reference import reference_page
from mini_infer.serving.results import results_router
from mini_infer.serving.service import Service, default_model_name, now
from mini_infer.serving.tokens import tokens_router

PAGE = Path(__file__).parent / "page"
"""The page at ``/``: plain files."""

_PAGE_POLICY = {"content-security-policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"}
"""The browser itself sees to it that the page asks no other host for anything."""


def create_app(
    engine: AsyncLLMEngine,
    *,
    api_key: str | None = None,
    served_model_name: str | None = None,
    request_timeout: float | None = None,
    cors: Seq[str] = (),
    max_body_bytes: int = 4 << 20,
    body_timeout: float = 30.0,
) -> FastAPI:
    """An application that serves one engine, which stays the caller's to shut down.

    Args:
        engine: generates.
        api_key: what callers must send as ``Authorization: Bearer KEY``; None asks for none. The page, ``/docs``,
            ``/health`` and ``/metrics`` are open to all.
        served_model_name: what requests call the model; None is its directory's or Hub name.
        request_timeout: seconds after which a request is given up; None never does.
        cors: origins whose pages may call this server, such as ``https://example.org``; "*" is any.
        max_body_bytes: largest body of a request.
        body_timeout: seconds within which a request's body must be there.
    """
    name = served_model_name or default_model_name(engine.engine.config)
    service = Service(engine, name, Admission(), request_timeout, now())
    metrics = Metrics(name)
    engine.observe(metrics.observe)

    app = FastAPI(
        title="Mini-Infer",
        description="OpenAI's endpoints for one model, and a few more.",
        version=mini_infer.__version__,
        docs_url=None,  # FastAPI's own pages load their scripts from another host
        redoc_url=None,
        responses={status: {"model": ErrorAnswer} for status in (400, 401, 404, 408, 413, 422, 429, 500, 503)},
    )
    app.state.admission = service.admission
    app.add_middleware(BoundBody, max_bytes=max_body_bytes, timeout=body_timeout)
    if api_key is not None:
        app.add_middleware(RequireKey, key=api_key)
    if cors:
        app.add_middleware(CORSMiddleware, allow_origins=list(cors), allow_methods=["*"], allow_headers=["*"])
    add_error_handlers(app)
    events = EngineEvents(engine, name, service.admission.draining)
    app.include_router(chat_router(service))
    app.include_router(completions_router(service))
    app.include_router(tokens_router(service))
    app.include_router(results_router(service))
    app.include_router(operations_router(service, metrics, events))
    _add_pages(app)
    return app


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every answer other than success."""

    error: ErrorDetail


def _add_pages(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers=_PAGE_POLICY)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(reference_page(app.openapi()), headers=_PAGE_POLICY)

    app.mount("/page", StaticFiles(directory=PAGE, check_dir=False))
