"""A program in a terminal of its own, driven as by a person: what is typed goes in, what is shown comes out."""

import codecs
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

CTRL_C, CTRL_D, CTRL_U, BACKSPACE = "\x03", "\x04", "\x15", "\x7f"


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
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._shown = ""
        self._place = 0  # what is before it has been expected

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *error: object) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(60)
        os.close(self._ours)

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def expect(self, pattern: str, timeout: float = 180) -> str:
        """Wait until a pattern is shown; everything up to its end, without colours."""
        found = self.shows(pattern, timeout)
        assert found, f"no {pattern!r} within {timeout} s or before the end\n{self._told()}"
        shown = self._shown[self._place : found.end()]
        self._place = found.end()
        return shown

    def shows(self, pattern: str, timeout: float) -> re.Match[str] | None:
        """Whether a pattern is shown in time; it can still be expected."""
        deadline = time.monotonic() + timeout
        while not (found := re.compile(pattern).search(self._shown, self._place)) and self._read(deadline):
            pass
        return found

    def status(self, timeout: float = 180) -> int:
        """Wait for the end; the exit status."""
        deadline = time.monotonic() + timeout
        while self._read(deadline):
            pass
        try:
            return self._process.wait(max(1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it has not ended within {timeout} s\n{self._told()}") from None

    def _read(self, deadline: float) -> bool:
        """Wait for more to be shown; False at the end of the program, or of the time."""
        ready, _, _ = select.select([self._ours], [], [], max(0, deadline - time.monotonic()))
        try:
            data = os.read(self._ours, 65536) if ready else b""
        except OSError:  # Linux says so when the program has ended
            data = b""
        self._shown = re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", self._shown + self._decoder.decode(data))
        return bool(data)

    def _told(self) -> str:
        return f"shown before: {self._shown[: self._place]!r}\nshown since: {self._shown[self._place :]!r}"
