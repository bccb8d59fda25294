"""Chat templates are rendered by children, since only a process can be ended for certain."""

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mini_infer.exceptions import InvalidRequestError, MiniInferError

SECONDS = 5.0
"""How long a template may take."""

_STARTING_SECONDS = 120.0
"""How long a child may take until it is ready."""


class TemplateChildren:
    """Makes a prompt of a template and its variables; as many at once as there are callers, each with a child.

    Args:
        max_characters: longest prompt.
    """

    def __init__(self, max_characters: int) -> None:
        self._max_characters = max_characters
        self._idle: list[subprocess.Popen[bytes]] = []
        self._closed = False

    def warm_up(self) -> None:
        """Start a child, so that the first conversation does not wait for it."""
        self._idle.append(self._start())

    def __call__(self, template: str, variables: Mapping[str, Any]) -> str:
        """The prompt.

        Raises:
            InvalidRequestError: the template refuses its variables, takes too long or makes too much of them.
        """
        request = {"template": template, "variables": variables, "most": self._max_characters}
        try:
            line = json.dumps(request).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(f"the chat template's variables must be JSON: {error}") from error
        child = self._idle.pop() if self._idle else self._start()
        answer = _ask(child, line, SECONDS)
        if not answer:
            _end(child)
            raise InvalidRequestError(
                f"the chat template did not end within {SECONDS:g} seconds, or took too much memory"
            )
        if self._closed:
            _end(child)
        else:
            self._idle.append(child)
        if "error" in answer:
            raise InvalidRequestError(f"the chat template cannot render these messages: {answer['error']}")
        text: str = answer["text"]
        return text

    def _start(self) -> "subprocess.Popen[bytes]":
        child = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("template_child.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        if not _ask(child, b"", _STARTING_SECONDS):
            _end(child)
            raise MiniInferError("the process that renders chat templates does not start")
        return child

    def close(self) -> None:
        self._closed = True
        while self._idle:
            _end(self._idle.pop())


def _ask(child: "subprocess.Popen[bytes]", line: bytes, seconds: float) -> dict[str, Any]:
    """What a child answers; nothing if it must be ended."""
    assert child.stdin is not None and child.stdout is not None
    limit = threading.Timer(seconds, child.kill)
    limit.daemon = True
    limit.start()
    try:
        child.stdin.write(line)
        child.stdin.flush()
        answer = child.stdout.readline()
        found: dict[str, Any] = json.loads(answer) if answer else {}
        return found
    except OSError:  # it has died
        return {}
    finally:
        limit.cancel()


def _end(child: "subprocess.Popen[bytes]") -> None:
    child.kill()
    for pipe in (child.stdin, child.stdout):
        assert pipe is not None
        with contextlib.suppress(OSError):
            pipe.close()
    child.wait()
