"""A program in a terminal of its own, driven as by a person: what is typed goes in, what is shown comes out."""

import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

# A controlling terminal, so that Ctrl-C is a signal.
LAUNCHER = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"

CTRL_C, CTRL_D, BACKSPACE = "\x03", "\x04", "\x7f"


class Terminal:
    """Runs a Python program.

    Args:
        arguments: of the interpreter.
        environment: beside the one of the tests.
        cwd: where it runs.
    """

    def __init__(self, *arguments: str, environment: dict[str, str], cwd: Path) -> None:
        self._ours, theirs = os.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, sys.executable, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env=os.environ | environment,
            cwd=cwd,
        )
        os.close(theirs)
        self._unread = ""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        os.close(self._ours)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def expect(self, pattern: str, timeout: float = 180) -> str:
        """Wait until a pattern is shown; everything up to its end, without colours."""
        deadline = time.monotonic() + timeout
        while not (found := re.search(pattern, self._unread)):
            ready, _, _ = select.select([self._ours], [], [], max(0, deadline - time.monotonic()))
            data = b""
            if ready:
                try:
                    data = os.read(self._ours, 65536)
                except OSError:  # Linux says so when the program has ended
                    data = b""
            assert data, f"no {pattern!r} within {timeout} s or before the end; shown: {self._unread!r}"
            self._unread += re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", data.decode(errors="replace"))
        shown, self._unread = self._unread[: found.end()], self._unread[found.end() :]
        return shown

    def status(self, timeout: float = 30) -> int:
        """Wait for the end; the exit status."""
        return self._process.wait(timeout)
