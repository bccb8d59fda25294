"""The other end of the pipe: starts a worker, lets it run only while it is asked, measures it from outside."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[2]


class WorkerError(Exception):
    """A worker could not do what it was asked, or died.

    Attributes:
        reason: why.
        log: where it wrote more.
    """

    def __init__(self, reason: str, log: str) -> None:
        super().__init__(f"{reason}; see {log}")
        self.reason, self.log = reason, log


@dataclass(frozen=True)
class Engine:
    """How to start one.

    Attributes:
        label: what tables call it.
        module: of its worker.
        options: that the worker gives to the engine.
        python: interpreter.
        environment: variables beside this process's own.
        directory: whose `mini_infer` it is, of an engine that is ours.
    """

    label: str
    module: str
    options: Mapping[str, Any]
    python: str = sys.executable
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: Path = ROOT


class Worker:
    """An engine with a model loaded, stopped whenever it is not its turn, so that nothing of it runs beside another.

    Attributes:
        engine: how it was started.
        version: of the engine.
        ready_seconds: from the start of the process until the model was loaded.
        first_token_seconds: from the start of the process until it had answered a request for one token.
    """

    def __init__(self, engine: Engine, model: str) -> None:
        self.engine = engine
        self._failed = False
        descriptor, name = tempfile.mkstemp(prefix=f"{engine.module}-", suffix=".log")
        self._log = Path(name)
        begin = time.perf_counter()
        self._process = subprocess.Popen(
            [engine.python, "-m", f"benchmarks.workers.{engine.module}", model, json.dumps(engine.options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=descriptor,
            text=True,
            cwd=engine.directory,  # where Python looks first
            env=os.environ | {"PYTHONPATH": str(ROOT)} | dict(engine.environment),
            start_new_session=True,  # a group of its own: its children stop and end with it
        )
        os.close(descriptor)
        try:
            self.version = self._answer()
            self.ready_seconds = time.perf_counter() - begin
            self.ask("run", [list(range(32))], [1], 0.0, -1, 1.0)
            self.first_token_seconds = time.perf_counter() - begin
        except BaseException:
            self.close()
            raise

    def ask(self, *message: Any) -> Any:
        """Let it work on a message until it answers.

        Raises:
            WorkerError: it failed.
        """
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self.error("is gone") from error
        return self._answer()

    def peak_memory(self) -> int | None:
        """Bytes that its processes held at most, each at its own worst moment; None where the system does not say."""
        if not Path("/proc/self/status").exists():
            return None
        peak = 0
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                if os.getsid(int(status.parent.name)) == self._process.pid:
                    peak += next(int(x.split()[1]) << 10 for x in status.read_text().splitlines() if "VmHWM" in x)
            except (OSError, StopIteration):  # it ended just now
                continue
        return peak

    def error(self, reason: str) -> WorkerError:
        """What to raise about it; its log is kept then."""
        self._failed = True
        return WorkerError(f"{self.engine.label} {reason}", str(self._log))

    def close(self) -> None:
        """End it, and whatever it started. Its log goes, too, unless it failed."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        with suppress(subprocess.TimeoutExpired, BrokenPipeError):
            self._process.stdin.close()
            self._process.wait(timeout=20)
        self._signal(signal.SIGKILL)
        self._process.wait()
        if not self._failed:
            self._log.unlink()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self.error("ended unexpectedly")
        message = json.loads(line)
        if "error" in message:
            raise self.error(f"failed: {message['error']}")
        self._signal(signal.SIGSTOP)
        return message["answer"]

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # nothing of it is left
            os.killpg(self._process.pid, number)
