"""Running the application: a socket, signals, and an end that cuts nobody off without need."""

import asyncio
import copy
import logging
import socket
from collections.abc import Sequence as Seq
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.config import LOGGING_CONFIG

from mini_infer.config import EngineConfig
from mini_infer.engine import AsyncLLMEngine
from mini_infer.exceptions import InvalidConfigError
from mini_infer.serving.admission import Admission
from mini_infer.serving.app import create_app

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 5
"""How long aborted answers may take to reach their clients before the connections are closed."""


def serve(
    config: EngineConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    served_model_name: str | None = None,
    request_timeout: float | None = None,
    cors: Seq[str] = (),
    drain_timeout: float = 30.0,
) -> None:
    """Serve a model over HTTP until SIGINT or SIGTERM.

    The first signal lets the requests under way finish, while new ones get status 503; the second, or the end of
    ``drain_timeout``, aborts them.

    Args:
        config: the engine's.
        host: the address to listen on; "0.0.0.0" is all of this machine's.
        port: 0 takes one that is free.
        drain_timeout: seconds that requests have to finish in.

    The other arguments are those of ``create_app``.

    Raises:
        InvalidConfigError: the address cannot be had, or the config is unusable.
        ModelNotFoundError, InvalidCheckpointError, UnsupportedModelError, OutOfMemoryError: about the checkpoint.
    """
    with _bind(host, port) as listener:  # before the model is loaded: a port that is taken shows at once
        engine = AsyncLLMEngine(config)
        try:
            app = create_app(
                engine, api_key=api_key, served_model_name=served_model_name, request_timeout=request_timeout, cors=cors
            )
            Server(app, engine, drain_timeout, _log_config()).run(sockets=[listener])
        finally:
            engine.shutdown()


class Server(uvicorn.Server):
    """Uvicorn, except for how it ends: new requests are refused and not just left unanswered, and running ones finish.

    Args:
        app: made by ``create_app``.
        engine: what it serves.
        drain_timeout: seconds that requests have to finish in.
        log_config: for ``logging.config``; None leaves logging as it is.
    """

    def __init__(
        self, app: FastAPI, engine: AsyncLLMEngine, drain_timeout: float, log_config: dict[str, Any] | None = None
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                access_log=False,
                log_config=log_config,
                server_header=False,
                ws="none",
                timeout_graceful_shutdown=FLUSH_SECONDS,
            )
        )
        self._admission: Admission = app.state.admission
        self._engine = engine
        self._drain_timeout = drain_timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: asyncio.Future[bool] | None = None
        self._stopping: asyncio.Future[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for listener in sockets or ():
            host, port = listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            logger.info("ready: http://%s:%d (API reference at /docs; Ctrl-C stops)", shown, port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second one stops; neither kills the process afterwards."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.stop)

    def stop(self) -> None:
        """In the event loop: begin to stop; or, if that was begun already, wait for nobody any more."""
        if self._waiting is None:
            logger.info("stopping: requests under way have %g seconds to finish", self._drain_timeout)
            self._waiting = asyncio.ensure_future(self._admission.drain(self._drain_timeout))
            self._stopping = asyncio.ensure_future(self._stop(self._waiting))
        else:
            self._waiting.cancel()

    async def _stop(self, waiting: "asyncio.Future[bool]") -> None:
        await asyncio.wait({waiting})
        if waiting.cancelled() or not waiting.result():
            logger.warning("stopping: aborting the requests that have not finished")
        await asyncio.to_thread(self._engine.shutdown)
        self.should_exit = True


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise InvalidConfigError(f"cannot listen on {host} port {port} ({error}); choose another") from error
    return listener


def _log_config() -> dict[str, Any]:
    """Uvicorn's, with this package's own messages beside its own."""
    config = copy.deepcopy(LOGGING_CONFIG)
    config["loggers"]["mini_infer"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    config["loggers"]["uvicorn"]["level"] = "WARNING"
    return config
