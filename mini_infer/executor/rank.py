"""A rank: a process that has a share of the model, and computes it for the steps that it is sent.

It knows nothing of requests. It is told once what its share is, loads that, and then runs whatever steps come, in their
order; of all ranks, one reports. It ends when its connection does, whatever it is doing.
"""

import argparse
import dataclasses
import logging
import os
import platform
import queue
import signal
import socket
import sys
import threading
import traceback
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from mini_infer.executor.wire import output_to_json, pack_message, unpack_message, unpack_step

FAILED = 1
"""Exit status after an error that was reported."""

ORPHANED = 3
"""Exit status when the connection has ended."""


def main() -> None:
    """What `launch` starts: the connection is a file descriptor that was inherited."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    serve(Connection(parser.parse_args().fd), machine="")


def versions() -> dict[str, str]:
    """What has to be the same on both sides."""
    try:
        torch_version = version("torch")
    except PackageNotFoundError:
        torch_version = "unknown"
    return {"mini-infer": version("mini-infer"), "torch": torch_version, "python": platform.python_version()}


def serve(connection: "Connection[Any, Any]", machine: str, device: str | None = None) -> NoReturn:
    """Be a rank until the connection ends.

    Args:
        machine: the address of this machine on the way to the driver; empty for the driver's own.
        device: where its share is; None leaves that to the driver.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which decides what becomes of it
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(connection, inbox), daemon=True).start()
    hello = {"versions": versions(), "host": socket.gethostname(), "pid": os.getpid(), "machine": machine}
    connection.send_bytes(pack_message(hello))
    status = 0
    try:
        _run(connection, inbox, machine, device)
    except BaseException as error:
        traceback.print_exc()
        status = FAILED
        said = {"error": type(error).__name__, "message": str(error), "lost_peer": _lost_peer(error)}
        connection.send_bytes(pack_message(said))
    # Not by way of the interpreter's end: threads of libraries may still wait for a peer that is no more.
    sys.stderr.flush()
    os._exit(status)


def _lost_peer(error: BaseException) -> bool:
    """Whether torch only says with this that another rank is gone. It may not be there to be asked for its classes."""
    return "DistError" in {kind.__name__ for kind in type(error).__mro__} or "gloo" in str(error)


def _read(connection: "Connection[Any, Any]", inbox: "queue.SimpleQueue[bytes]") -> None:
    """Take messages in as they come, so that the driver never waits until one is read; and end with the driver, even
    while the main thread is in the middle of a sum that nobody will ever complete."""
    message = b"-"
    while message:  # an empty one is a farewell, after which the end of the connection means nothing
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError) as error:
            print(f"RankError: the engine has ended, or cannot be reached ({error or 'end of file'})", file=sys.stderr)
            sys.stderr.flush()
            os._exit(ORPHANED)
        inbox.put(message)


class _Forward(logging.Handler):
    """Has the driver write down what is logged here."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        super().__init__(logging.INFO)
        self._connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        self._connection.send_bytes(pack_message({"log": record.levelno, "message": record.getMessage()}))


def _run(
    connection: "Connection[Any, Any]", inbox: "queue.SimpleQueue[bytes]", machine: str, device_name: str | None
) -> None:
    setup = unpack_message(inbox.get())
    rank, stages, shards = setup["rank"], setup["stages"], setup["shards"]

    from mini_infer.config import EngineConfig
    from mini_infer.executor.build import load, make_runner
    from mini_infer.executor.device import on, resolve_device, wait_for
    from mini_infer.models import read_config, resolve_model
    from mini_infer.parallel.group import interface_of, join
    from mini_infer.parallel.share import Peers, Share

    if rank == 0:
        log = logging.getLogger("mini_infer")
        log.setLevel(logging.INFO)
        log.addHandler(_Forward(connection))
    config = EngineConfig(**setup["config"])
    device = resolve_device(device_name or setup["device"])
    with on(device):
        group, link = join(
            tuple(setup["store"]), rank, stages, shards, device, interface_of(machine or "127.0.0.1"), setup["timeout"]
        )
        peers = Peers(Share(group, rank // shards, stages), link)
        directory = resolve_model(str(config.model), config.revision, config.cache_dir)
        loaded = load(config, directory, read_config(directory), device, peers)
        memory = loaded.memory
        if memory.warning is not None:
            logging.getLogger(__name__).warning(memory.warning)
        found = {
            "num_blocks": memory.num_blocks,
            "max_model_len": memory.max_model_len,
            "block_bytes": memory.bytes_per_block,
            "num_parameters": loaded.model.num_parameters,
            "device": str(device),
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
        }
        connection.send_bytes(pack_message(found))
        agreed = unpack_message(inbox.get())
        runner = make_runner(config, loaded, agreed["num_blocks"], agreed["max_model_len"], link)
        connection.send_bytes(pack_message({"ready": True}))
        reports = rank == (stages - 1) * shards
        while message := inbox.get():
            step = unpack_step(message)
            computed = runner.run(step)
            if reports:
                computed = computed.in_memory()
                wait_for(device)
                output = computed.to_output(step)
                connection.send_bytes(pack_message({"output": output_to_json(output)}))


def config_fields(config: Any) -> dict[str, Any]:
    """What a rank needs of a configuration, as JSON can hold it."""
    groups = (config.checkpoint, config.executor, config.cache, config.scheduler)
    values = {name: value for group in groups for name, value in dataclasses.asdict(group).items()}
    del values["scheduling_policy"]  # it may be an object, and is none of a rank's business
    return values


if __name__ == "__main__":
    main()
