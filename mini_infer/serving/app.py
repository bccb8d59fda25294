"""The application: every endpoint around one engine."""

from collections.abc import AsyncIterator
from collections.abc import Sequence as Seq
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from starlette.responses import FileResponse, HTMLResponse

import mini_infer
from mini_infer.engine import AsyncLLMEngine
from mini_infer.exceptions import InvalidConfigError
from mini_infer.fields import check_number
from mini_infer.serving.admission import Admission, Budget
from mini_infer.serving.chat import chat_router
from mini_infer.serving.completions import completions_router
from mini_infer.serving.embeddings import embeddings_router
from mini_infer.serving.errors import add_error_handlers
from mini_infer.serving.events import EngineEvents
from mini_infer.serving.limits import Limits
from mini_infer.serving.metrics import Metrics
from mini_infer.serving.middleware import BoundBody, KnowPages, NameRequests, RequireKey, TidyPaths
from mini_infer.serving.operations import operations_router
from mini_infer.serving.reference import reference_page
from mini_infer.serving.responses import responses_router
from mini_infer.serving.results import results_router
from mini_infer.serving.service import Pools, Service, default_model_name, fingerprint, now
from mini_infer.serving.templates import TemplateChildren
from mini_infer.serving.tokens import tokens_router
from mini_infer.serving.turns import Turns

PAGE = Path(__file__).parent / "page"
"""The page at ``/``: plain files."""

MAX_WAITING = 1024
"""Requests that may wait, unless the engine's config says how many."""

STEP_TIMEOUT = 300.0
"""Seconds after which a step is taken to be stuck, unless the caller says how many."""

_PAGE_POLICY = {"content-security-policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"}
"""The browser itself sees to it that the page asks no other host for anything."""


def create_app(
    engine: AsyncLLMEngine,
    *,
    api_key: str | Seq[str] | None = None,
    salt_by_key: bool = False,
    served_model_name: str | Seq[str] | None = None,
    request_timeout: float | None = None,
    step_timeout: float = STEP_TIMEOUT,
    cors: Seq[str] = (),
    allowed_hosts: Seq[str] = (),
    max_body_bytes: int = 4 << 20,
    body_timeout: float = 30.0,
) -> FastAPI:
    """An application that serves one engine, which stays the caller's to shut down.

    Args:
        engine: generates.
        api_key: what callers must send as ``Authorization: Bearer KEY``, or several such; None asks for none. The
            page, ``/docs`` and ``/health`` are open to all. Callers with different keys take turns.
        salt_by_key: share no cached prefixes between callers with different keys.
        served_model_name: what requests call the model, or several names of it, of which answers use the first; None is
            its directory's or Hub name.
        request_timeout: seconds after which a request is given up; None never does.
        step_timeout: seconds after which a step of the engine is taken to be stuck, which ``/health`` tells.
        cors: origins whose pages may call this server, such as ``https://example.org``; "*" is any.
        allowed_hosts: names by which the server may be called on a loopback address without a key.
        max_body_bytes: largest body of a request.
        body_timeout: seconds within which a request's body must be there.

    Raises:
        InvalidConfigError: a key that is empty or cannot be sent, or a time that is none.
    """
    keys = check_options(api_key, salt_by_key, request_timeout, step_timeout)
    check_number(InvalidConfigError, "body_timeout", body_timeout, 0, open_low=True)
    names = (served_model_name,) if isinstance(served_model_name, str) else tuple(served_model_name or ())
    names = tuple(filter(None, names)) or (default_model_name(engine.config),)
    limits = Limits.of(engine.max_model_len, max_body_bytes, engine.config.max_waiting or MAX_WAITING)
    templates = TemplateChildren(limits.prompt_characters)
    engine.render_with(templates)
    service = Service(
        engine=engine,
        model_names=names,
        fingerprint=fingerprint(engine.config),
        admission=Admission(),
        request_timeout=request_timeout,
        step_timeout=step_timeout,
        salts_by_key=salt_by_key,
        shares_by_key=len(keys) > 1,
        limits=limits,
        turns=Turns(engine, limits.waiting_requests, Budget("held_prompt_tokens", limits.held_prompt_tokens)),
        held_logprobs=Budget("held_logprobs", limits.held_logprobs),
        pools=Pools.make(),
        started=now(),
    )
    metrics = Metrics(service.model_name)
    engine.observe(metrics.observe)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.pools.close()
        templates.close()

    app = FastAPI(
        lifespan=lifespan,
        title="Mini-Infer",
        description="OpenAI's endpoints for one model, and a few more.",
        version=mini_infer.__version__,
        docs_url=None,  # FastAPI's own pages load their scripts from another host
        redoc_url=None,
        responses={status: {"model": ErrorAnswer} for status in (400, 401, 403, 404, 408, 413, 422, 429, 500, 503)},
    )
    app.state.admission = service.admission
    app.state.step_timeout = step_timeout
    app.state.templates = templates
    held = Budget("held_body_bytes", limits.held_body_bytes)
    app.add_middleware(BoundBody, max_bytes=max_body_bytes, timeout=body_timeout, held=held)
    if keys:
        app.add_middleware(RequireKey, keys=keys)
    else:
        app.add_middleware(KnowPages, hosts=allowed_hosts, origins=cors)
    app.add_middleware(TidyPaths)
    if cors:
        app.add_middleware(CORSMiddleware, allow_origins=list(cors), allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(NameRequests)
    add_error_handlers(app)
    events = EngineEvents(engine, service.model_name, service.admission.draining)
    app.include_router(chat_router(service))
    app.include_router(completions_router(service))
    app.include_router(responses_router(service))
    app.include_router(embeddings_router(service))
    app.include_router(tokens_router(service))
    app.include_router(results_router(service))
    app.include_router(operations_router(service, metrics, events))
    _add_pages(app)
    return app


def check_options(
    api_key: str | Seq[str] | None, salt_by_key: bool, request_timeout: float | None, step_timeout: float
) -> list[str]:
    """The keys, all of which a client can send. An empty one is a variable that was not filled in, not the wish for
    an open server.

    Raises:
        InvalidConfigError: a key, or a time, is none.
    """
    for option, seconds in (("request_timeout", request_timeout), ("step_timeout", step_timeout)):
        if seconds is not None:
            check_number(InvalidConfigError, option, seconds, 0, open_low=True)
    keys = [] if api_key is None else [api_key] if isinstance(api_key, str) else list(api_key)
    for key in keys:
        if not key or not all("!" <= character <= "~" for character in key):
            raise InvalidConfigError(
                f"an API key of {len(key)} characters is empty or has others than visible ASCII ones; give another, or "
                "leave it out (and unset MINI_INFER_API_KEY) for a server that is open to all"
            )
    if salt_by_key and not keys:
        raise InvalidConfigError("salt_by_key needs keys to tell callers by; give api_key, too")
    return keys


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
