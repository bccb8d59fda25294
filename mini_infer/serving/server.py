"""Running the application: a socket, signals, and an end that cuts nobody off without need."""

import asyncio
import copy
import gc
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence as Seq
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.config import LOGGING_CONFIG

from mini_infer.config import EngineConfig
from mini_infer.engine import AsyncLLMEngine
from mini_infer.exceptions import InvalidConfigError
from mini_infer.fields import check_number
from mini_infer.serving.admission import Admission
from mini_infer.serving.app import STEP_TIMEOUT, check_options, create_app
from mini_infer.serving.connections import BACKLOG, QUEUE, FewLines, bounded, max_connections
from mini_infer.serving.heap import give_back, have_few_heaps

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 5
"""How long aborted answers may take to reach their clients before the connections are closed."""

JOIN_SECONDS = 10.0
"""How long the step under way may take once everybody has been told."""

SWITCH_SECONDS = 0.0001
"""How long one thread may keep the others from Python: the engine's asks for its turn several times in each step."""

TIDY_SECONDS = 5.0
"""How often memory that nobody uses goes back to the system."""

STUCK = 70
"""Exit status when a step did not end."""


def serve(
    config: EngineConfig,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | Seq[str] | None = None,
    salt_by_key: bool = False,
    served_model_name: str | Seq[str] | None = None,
    request_timeout: float | None = None,
    step_timeout: float = STEP_TIMEOUT,
    cors: Seq[str] = (),
    allowed_hosts: Seq[str] = (),
    drain_timeout: float = 30.0,
) -> None:
    """Serve a model over HTTP until SIGINT or SIGTERM.

    The first signal lets the requests under way finish, while new ones get status 503; the second, or the end of
    ``drain_timeout``, ends them with an error; the third ends the process there and then. So does, with status 70, a
    step that has not ended after twice its ``step_timeout``, or ten seconds after everything else.

    Args:
        config: the engine's.
        host: the address to listen on; "0.0.0.0" is all of this machine's.
        port: 0 takes one that is free.
        drain_timeout: seconds that requests have to finish in.

    The other arguments are those of ``create_app``.

    Raises:
        InvalidConfigError: the address cannot be had, or the config or an option is unusable.
        ModelNotFoundError, InvalidCheckpointError, UnsupportedModelError, OutOfMemoryError: about the checkpoint.
        RankError: what computes has died, and could not be started anew; everybody who waited was told.
    """
    check_options(api_key, salt_by_key, request_timeout, step_timeout)  # before the model is loaded
    check_number(InvalidConfigError, "drain_timeout", drain_timeout, 0)
    have_few_heaps()
    with _bind(host, port) as listener:  # a port that is taken shows at once, too
        engine = AsyncLLMEngine(config)
        try:
            app = create_app(
                engine,
                api_key=api_key,
                salt_by_key=salt_by_key,
                served_model_name=served_model_name,
                request_timeout=request_timeout,
                step_timeout=step_timeout,
                cors=cors,
                allowed_hosts=allowed_hosts,
            )
            threading.Thread(target=app.state.templates.warm_up, daemon=True).start()
            gc.collect()
            gc.freeze()  # what is there now stays, and need not be looked through again and again
            sys.setswitchinterval(SWITCH_SECONDS)
            Server(app, engine, drain_timeout, _log_config()).run(sockets=[listener])
        finally:
            gc.unfreeze()  # or libraries complain of what is left when the interpreter ends
            has_ended = engine.shutdown(JOIN_SECONDS)
    if engine.failure is not None:
        raise engine.failure
    if not has_ended:  # Python would wait for it
        logging.shutdown()
        os._exit(STUCK)


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
                http=bounded(max_connections()),
                loop="asyncio",
                backlog=BACKLOG,
                log_config=log_config,
                server_header=False,
                ws="none",
                timeout_graceful_shutdown=FLUSH_SECONDS,
            )
        )
        self._admission: Admission = app.state.admission
        self._step_timeout: float = app.state.step_timeout
        self._engine = engine
        self._drain_timeout = drain_timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: asyncio.Future[bool] | None = None
        self._stopping: asyncio.Future[None] | None = None
        self._watching: asyncio.Future[None] | None = None
        self._num_signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._watching = asyncio.ensure_future(self._watch())
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(QUEUE)  # asyncio accepts BACKLOG at a time, but more may wait in the kernel
            host, port = listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            logger.info("ready: http://%s:%d (API reference at /docs; Ctrl-C stops)", shown, port)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second one stops; neither kills the process afterwards, but the third does."""
        self._num_signals += 1
        if self._loop is None:  # there is nothing to stop yet
            raise SystemExit(128 + sig)
        if self._num_signals > 2:
            print("stopped at once", file=sys.stderr, flush=True)
            os._exit(1)
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
            logger.warning("stopping: giving up the requests that have not finished")
        await asyncio.to_thread(self._engine.shutdown, JOIN_SECONDS)
        self.should_exit = True

    async def _watch(self) -> None:
        """A step that does not end is the end of the server, so that whoever started it can start it again."""
        warned = False
        tidied = time.monotonic()
        while True:
            await asyncio.sleep(min(1.0, self._step_timeout / 4))
            if time.monotonic() - tidied > TIDY_SECONDS:
                await asyncio.to_thread(give_back)
                tidied = time.monotonic()
            if self._engine.failure is not None:
                logger.critical("the engine has ended, and so does the server: %s", self._engine.failure)
                self._admission.draining.set()
                self.should_exit = True
                return
            seconds = self._engine.step_seconds
            if seconds > self._step_timeout and not warned:
                logger.critical("a step has been running for %.0f seconds; /health says so", seconds)
            warned = seconds > self._step_timeout
            if seconds > 2 * self._step_timeout:
                logger.critical("a step has been running for %.0f seconds; the server ends", seconds)
                self._admission.draining.set()
                await asyncio.to_thread(self._engine.shutdown, 0)
                self.should_exit = True
                return

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._watching is not None:
            self._watching.cancel()
        await super().shutdown(sockets)


def _bind(host: str, port: int) -> socket.socket:
    if not host.strip():
        raise InvalidConfigError("the host is empty; 127.0.0.1 is this machine alone, 0.0.0.0 every address it has")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(1)  # else another server could take the same port while this one loads
    except (OSError, OverflowError) as error:
        listener.close()
        raise InvalidConfigError(f"cannot listen on {host} port {port} ({error}); choose another") from error
    return listener


def _log_config() -> dict[str, Any]:
    """Uvicorn's, with this package's own messages beside its own."""
    config = copy.deepcopy(LOGGING_CONFIG)
    config["loggers"]["mini_infer"] = {"handlers": ["default"], "level": "INFO", "propagate": False}
    config["loggers"]["uvicorn"]["level"] = "WARNING"
    for name in ("uvicorn.error", "asyncio"):  # which clients can make say something as often as they like
        logging.getLogger(name).addFilter(FewLines(10, 60.0))
    return config
