"""Starting ranks, and the connections to them: child processes of this one, or whoever joins by hand."""

import contextlib
import hashlib
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import AuthenticationError, Pipe
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import IO, Any, Protocol

from mini_infer.exceptions import InvalidConfigError, RankError

logger = logging.getLogger(__name__)

KEY_VARIABLE = "MINI_INFER_RANK_KEY"
"""Environment variable with the key that ranks which join by hand and their driver share."""

_PATIENCE = 5.0
"""Seconds that a rank has to end by itself, to take a message, or to prove that it knows the key."""

_SHOWN_LINES = 8
"""Of what a rank wrote before it died."""


@dataclass
class RankProcess:
    """A rank, as its driver sees it.

    Attributes:
        connection: to it.
        process: the child; None if somebody else started it.
        stderr: a file without a name that it writes to; None likewise.
        machine: its address, as the driver sees it; empty for the driver's own children.
    """

    connection: "Connection[Any, Any]"
    process: "subprocess.Popen[bytes] | None" = None
    stderr: "IO[bytes] | None" = None
    machine: str = ""

    def how_it_ended(self) -> str | None:
        """In words; None if it runs, or nobody can tell."""
        code = None if self.process is None else self.process.poll()
        if code is None:
            return None
        if code >= 0:
            return f"it ended with status {code}"
        try:
            return f"it was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"it was killed by signal {-code}"

    def last_words(self) -> str:
        """The end of what it wrote."""
        if self.stderr is None:
            return ""
        self.stderr.seek(0)
        lines = self.stderr.read().decode(errors="replace").strip().splitlines()
        return "\n".join(lines[-_SHOWN_LINES:])

    def say_goodbye(self) -> None:
        """Ask it to end."""
        with contextlib.suppress(OSError):
            self.connection.send_bytes(b"")

    def close(self, kill: bool) -> None:
        """See that it has ended: at once, or after it had some time for that."""
        self.connection.close()
        if self.process is not None:
            try:
                self.process.wait(0 if kill else _PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.stderr is not None:
            self.stderr.close()


class Launcher(Protocol):
    """Starts the ranks of one replica."""

    host: str
    """The address of this machine, as the ranks see it."""

    @property
    def can_restart(self) -> bool:
        """Whether it can start others in their place."""

    def launch(self, size: int, timeout: float) -> list[RankProcess]:
        """Start them, or wait for them.

        Raises:
            RankError: not all have come in time.
        """

    def close(self) -> None:
        """No more will be started."""


class ChildProcesses:
    """Ranks as children of this process. They are started as a module, so a script needs no ``__main__`` guard.

    Args:
        num_local: ranks on this machine, of all replicas, which share its processor's cores.
    """

    host = "127.0.0.1"
    can_restart = True

    def __init__(self, num_local: int) -> None:
        self._num_local = num_local

    def launch(self, size: int, timeout: float) -> list[RankProcess]:
        ranks: list[RankProcess] = []
        try:
            for _ in range(size):
                ranks.append(self._start())
        except BaseException:
            for rank in ranks:
                rank.close(kill=True)
            raise
        return ranks

    def _start(self) -> RankProcess:
        ours, theirs = Pipe()
        with theirs:
            limit_sending(ours, _PATIENCE)
            stderr = tempfile.TemporaryFile()  # noqa: SIM115  (the rank's, for as long as it lives)
            process = subprocess.Popen(
                [sys.executable, "-m", "mini_infer.executor.rank", "--fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                env=self._environment(),
                start_new_session=True,  # a terminal's Ctrl-C is for the driver
            )
        return RankProcess(ours, process, stderr)

    def _environment(self) -> dict[str, str]:
        package = str(Path(__file__).parents[2])
        paths = os.environ.get("PYTHONPATH")
        return {
            **thread_limits(num_cores() // self._num_local),
            **os.environ,
            "PYTHONPATH": package if not paths else os.pathsep.join((package, paths)),
        }

    def close(self) -> None:
        pass


class Joined:
    """Ranks that somebody starts by hand, on any machine, with ``mini-infer rank --join``.

    Args:
        address: HOST:PORT to listen on.
        key: what ranks have to know.

    Raises:
        InvalidConfigError: the address cannot be had.
    """

    can_restart = False

    def __init__(self, address: str, key: bytes) -> None:
        self._key = key
        self._lock = threading.Lock()
        host, port = parse_address(address)
        try:
            self.host = socket.gethostbyname(host)
            self._listening = socket.create_server((self.host, port))
        except OSError as error:
            raise InvalidConfigError(
                f"rank_address={address!r}: cannot listen there ({error}); choose another"
            ) from error
        self.port = self._listening.getsockname()[1]

    def launch(self, size: int, timeout: float) -> list[RankProcess]:
        logger.info("waiting for %d ranks: mini-infer rank --join %s:%d", size, self.host, self.port)
        ranks: list[RankProcess] = []
        deadline = time.monotonic() + timeout
        try:
            with self._lock:  # replicas wait one after the other, each for as many neighbours as it needs
                while len(ranks) < size:
                    ranks.append(self.accept(deadline, len(ranks), size))
        except BaseException:
            for rank in ranks:
                rank.close(kill=True)
            raise
        machines = [rank.machine for rank in ranks]
        return sorted(ranks, key=lambda rank: machines.index(rank.machine))  # neighbours have most to say to each other

    def accept(self, deadline: float, num_joined: int, size: int) -> RankProcess:
        """The next of ``size`` ranks.

        Raises:
            RankError: none has come in time.
        """
        while (left := deadline - time.monotonic()) > 0:
            self._listening.settimeout(left)
            try:
                caller, address = self._listening.accept()
            except TimeoutError:
                break
            connection = connection_of(caller)
            try:
                deliver_challenge(connection, self._key)
                answer_challenge(connection, self._key)
            except (AuthenticationError, EOFError, OSError) as error:
                logger.warning("%s wanted to be a rank, without the key (%s)", address[0], error)
                connection.close()
                continue
            limit_receiving(connection, 0)
            return RankProcess(connection, machine=address[0])
        raise RankError(
            f"{num_joined} of {size} ranks have joined at {self.host}:{self.port} in time; start the others with "
            f"mini-infer rank --join, the same {KEY_VARIABLE} and a way to this address"
        )

    def close(self) -> None:
        self._listening.close()


def call(address: str, key: bytes, timeout: float) -> tuple["Connection[Any, Any]", str]:
    """Join a driver as a rank: the connection, and this machine's address on the way there.

    Raises:
        InvalidConfigError: the address is none.
        RankError: nobody listens there, or the key is another.
    """
    host, port = parse_address(address)
    deadline = time.monotonic() + timeout
    while True:  # whoever starts both at once does not know which is first
        try:
            caller = socket.create_connection((host, port), timeout)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise RankError(f"cannot reach a driver at {address}: {error}") from error
            time.sleep(0.1)
    caller.settimeout(None)
    machine = caller.getsockname()[0]
    connection = connection_of(caller)
    try:
        answer_challenge(connection, key)
        deliver_challenge(connection, key)
    except (AuthenticationError, EOFError, OSError) as error:
        raise RankError(f"the driver at {address} has another key; set {KEY_VARIABLE} to the same on both") from error
    limit_receiving(connection, 0)
    return connection, machine


def shared_key() -> bytes:
    """The key from the environment.

    Raises:
        InvalidConfigError: it is not there.
    """
    key = os.environ.get(KEY_VARIABLE, "")
    if not key:
        raise InvalidConfigError(
            f"ranks that join by hand share a key with their driver: set the environment variable {KEY_VARIABLE} to "
            "the same long random text for all of them"
        )
    return hashlib.sha256(key.encode()).digest()


def parse_address(address: str) -> tuple[str, int]:
    """HOST:PORT in two parts.

    Raises:
        InvalidConfigError: it is none.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidConfigError(f"an address is HOST:PORT, as in 192.168.0.1:7000; got {address!r}")
    return host, int(port)


def connection_of(caller: socket.socket) -> "Connection[Any, Any]":
    """A connection over TCP that waits for no acknowledgement, and notices within seconds when the way is cut."""
    caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, seconds in (("TCP_KEEPIDLE", 2), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 6000)):
        if hasattr(socket, name):
            caller.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
    caller.setblocking(True)
    connection: Connection[Any, Any] = Connection(caller.detach())
    limit_sending(connection, _PATIENCE)
    limit_receiving(connection, _PATIENCE)
    return connection


def limit_sending(connection: "Connection[Any, Any]", seconds: float) -> None:
    """Have a send to somebody who reads nothing raise instead of waiting for ever."""
    _limit(connection, socket.SO_SNDTIMEO, seconds)


def limit_receiving(connection: "Connection[Any, Any]", seconds: float) -> None:
    """The same for receiving; 0 waits for ever."""
    _limit(connection, socket.SO_RCVTIMEO, seconds)


def _limit(connection: "Connection[Any, Any]", option: int, seconds: float) -> None:
    with _socket_of(connection) as same:
        same.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), 0))


@contextlib.contextmanager
def _socket_of(connection: "Connection[Any, Any]") -> Iterator[socket.socket]:
    same = socket.socket(fileno=connection.fileno())
    try:
        yield same
    finally:
        same.detach()


def thread_limits(num_threads: int) -> dict[str, str]:
    """Environment variables by which libraries take so many threads; at least one."""
    return dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), str(max(1, num_threads)))


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
