"""A section in a process of its own: what it yields arrives one by one, whatever becomes of it afterwards."""

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import TypeAlias

from benchmarks.gpu_suite.figure import Context, Figure

Section: TypeAlias = Callable[[Context], Iterator[Figure]]


def run(section: Section, context: Context, limit: float) -> tuple[list[Figure], str | None]:
    """The figures that a section yields within `limit` seconds, in a fresh process, and why they may not be all."""
    if limit <= 0:
        return [], "no time was left for it"
    processes = get_context("spawn")
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=_send, args=(section, context, sender))
    process.start()
    sender.close()
    figures: list[Figure] = []
    end = time.monotonic() + limit
    try:
        while receiver.poll(max(0, end - time.monotonic())):
            item = receiver.recv()
            if not isinstance(item, Figure):
                return figures, item  # None when all went well
            figures.append(item)
        return figures, f"its {limit:.0f} seconds were up"
    except EOFError:
        process.join()
        return figures, f"its process ended with exit code {process.exitcode}"
    finally:
        with suppress(ProcessLookupError):  # it may be over
            os.killpg(process.pid, signal.SIGKILL)  # and whatever it started
        process.kill()  # it may not have a group yet
        process.join()


def _send(section: Section, context: Context, sender: Connection) -> None:
    os.setsid()
    try:
        for figure in section(context):
            sender.send(figure)
        sender.send(None)
    except Exception:
        sender.send(traceback.format_exc())
