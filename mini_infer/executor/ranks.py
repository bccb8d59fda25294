"""An executor of several processes, each with a share of the model.

The driver, which plans and publishes, is none of them: what happens to a rank, an abort of a library or a lack of
memory, is an exception here. Every rank gets the same bytes for a step and runs it; the first of the last stage draws,
and answers. One that says that it failed, or whose connection ends, is the end of all of them, for they wait for each
other. They are started anew once, and the steps under way are computed again; if that happens again within a minute,
it is the end of the engine.
"""

import contextlib
import logging
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from mini_infer import exceptions
from mini_infer.config import EngineConfig, ParallelOptions
from mini_infer.exceptions import InvalidConfigError, MiniInferError, RankError
from mini_infer.executor.build import Local
from mini_infer.executor.device import expand_devices, resolve_device
from mini_infer.executor.launch import ChildProcesses, Joined, Launcher, RankProcess, shared_key
from mini_infer.executor.rank import config_fields, versions
from mini_infer.executor.wire import output_from_json, pack_message, pack_step, unpack_message
from mini_infer.interrupts import uninterrupted
from mini_infer.models import ModelConfig
from mini_infer.parallel.group import Store, check_available
from mini_infer.parallel.mesh import Mesh
from mini_infer.parallel.slices import fits_heads
from mini_infer.step import ExecutorRestarted, StepInput, StepOutput

logger = logging.getLogger(__name__)

RESTART_INTERVAL = 60.0
"""Seconds in which ranks are started anew once."""

_AUTOPSY_SECONDS = 0.5
"""How long to look for the rank that died, when another one says that its peer is gone."""

_GROUP_SHARE = 0.9
"""Of ``rank_timeout``, after which a rank gives up waiting for another, and so says of whom it heard nothing."""


@dataclass(frozen=True, slots=True)
class RankStep:
    """A step that was sent to the ranks."""

    executor: "RankExecutor"
    number: int

    def result(self) -> StepOutput:
        return self.executor.result(self.number)

    def fileno(self) -> int:
        """Of the connection on which the answer comes."""
        return self.executor.fileno()


class RankExecutor:
    """The ranks of one replica.

    Args:
        config: the engine's.
        directory: of the checkpoint.
        devices: one for each rank, shards of a stage side by side.
        launcher: starts them.

    Raises:
        RankError: they could not be started.
        MiniInferError: what one of them raised while it loaded its share.
    """

    def __init__(self, config: EngineConfig, directory: Path, devices: Sequence[str], launcher: Launcher) -> None:
        self._config, self._directory, self._devices, self._launcher = config, directory, devices, launcher
        mesh = Mesh.of(config)
        self._stages, self._shards = mesh.stages, mesh.shards
        self._ranks: list[RankProcess] = []
        self._outputs: dict[int, StepOutput] = {}
        self._num_submitted = self._num_answered = 0
        self._last_restart: float | None = None
        self._error: MiniInferError | None = None
        self._agreed: dict[str, int] | None = None
        self._finalizer = weakref.finalize(self, _close_all, self._ranks, self._launcher)  # at exit, too
        try:
            self.found = self._start()
        except BaseException:
            self.close()
            raise

    # ---- steps ---------------------------------------------------------------------------------------------------

    def submit(self, step: StepInput, /) -> RankStep:
        if self._error is not None:
            raise self._error
        message = pack_step(step)
        with uninterrupted():  # half a message would be the end
            for number, rank in enumerate(self._ranks):
                try:
                    rank.connection.send_bytes(message)
                except OSError as error:
                    raise self._fail(f"rank {number} takes no more steps ({error})", number) from None
            self._num_submitted += 1
        return RankStep(self, self._num_submitted)

    def result(self, number: int) -> StepOutput:
        deadline = time.monotonic() + self._config.rank_timeout
        while number > self._num_answered:
            if self._error is not None:
                raise self._error
            _, message = self._receive(deadline, "step")
            if "output" in message:
                self._num_answered += 1
                self._outputs[self._num_answered] = output_from_json(message["output"])
                deadline = time.monotonic() + self._config.rank_timeout
        if number not in self._outputs:
            raise ExecutorRestarted("this step was lost when the ranks were started anew")
        for old in [old for old in self._outputs if old < number]:
            del self._outputs[old]  # of steps that nobody waits for any more
        return self._outputs[number]

    def fileno(self) -> int:
        return self._ranks[(self._stages - 1) * self._shards].connection.fileno()

    def close(self) -> None:
        if self._error is None:
            self._error = exceptions.EngineError("the engine was closed; make a new one")
        self._finalizer()

    # ---- their lives ---------------------------------------------------------------------------------------------

    def _start(self) -> list[dict[str, Any]]:
        """Start the ranks, and have them load their shares and agree on how many blocks there are; what each found."""
        deadline = time.monotonic() + self._config.start_timeout
        size = self._stages * self._shards
        with uninterrupted():
            self._ranks += self._launcher.launch(size, self._config.start_timeout)
        self._store = store = Store(self._launcher.host) if size > 1 else None
        for hello in self._hear(deadline, "first word"):
            if hello["versions"] != versions():
                raise RankError(f"a rank on {hello['host']} has {hello['versions']}, and the driver {versions()}")
        fields = config_fields(self._config)
        if isinstance(self._launcher, ChildProcesses):
            fields["model"] = str(self._directory.resolve())
        for number in range(size):
            self._tell(
                number,
                {
                    "rank": number,
                    "stages": self._stages,
                    "shards": self._shards,
                    "store": [self._launcher.host, store.port if store else 0],
                    "timeout": self._config.rank_timeout * _GROUP_SHARE,
                    "device": self._devices[number],
                    "config": fields,
                },
            )
        found = self._hear(deadline, "loading")
        dtypes = {each["dtype"] for each in found}
        if len(dtypes) > 1:
            raise InvalidConfigError(f"the ranks' machines would compute in {', '.join(sorted(dtypes))}; say dtype=...")
        num_blocks = min(each["num_blocks"] for each in found)
        longest = min(*(each["max_model_len"] for each in found), num_blocks * self._config.block_size)
        agreed = {"num_blocks": num_blocks, "max_model_len": longest}
        if self._agreed is not None and num_blocks < self._agreed["num_blocks"]:
            raise RankError(f"only {num_blocks} KV blocks fit now, of {self._agreed['num_blocks']} before")
        self._agreed = self._agreed or agreed
        for number in range(size):
            self._tell(number, self._agreed)
        self._hear(deadline, "getting ready")
        return found

    @property
    def num_blocks(self) -> int:
        assert self._agreed is not None
        return self._agreed["num_blocks"]

    @property
    def max_model_len(self) -> int:
        assert self._agreed is not None
        return self._agreed["max_model_len"]

    def _tell(self, number: int, message: dict[str, Any]) -> None:
        try:
            self._ranks[number].connection.send_bytes(pack_message(message))
        except OSError as error:
            raise self._blame(f"rank {number} does not listen ({error})", number) from None

    def _hear(self, deadline: float, what: str) -> list[dict[str, Any]]:
        """One message of each rank."""
        heard: dict[int, dict[str, Any]] = {}
        while len(heard) < len(self._ranks):
            place, message = self._take(deadline, what)
            heard[place] = message
        return [heard[place] for place in range(len(self._ranks))]

    def _receive(self, deadline: float, what: str) -> tuple[int, dict[str, Any]]:
        """The next message of a rank while steps are computed; a sign that one has died ends them all."""
        try:
            return self._take(deadline, what)
        except MiniInferError as error:
            raise self._restart(error) from None

    def _take(self, deadline: float, what: str) -> tuple[int, dict[str, Any]]:
        """The next message of any rank, with its number.

        Raises:
            RankError: one has died, or says nothing.
            MiniInferError: one raised that.
        """
        while True:
            connections = [rank.connection for rank in self._ranks]
            ready = wait(connections, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RankError(
                    f"no rank has answered in time ({what}); it hangs, or its machine is gone. The limit is "
                    "rank_timeout, or start_timeout at first"
                )
            place = next(i for i, connection in enumerate(connections) if connection in ready)
            try:
                with uninterrupted():
                    message = unpack_message(connections[place].recv_bytes())
            except (EOFError, OSError):
                raise self._blame(f"rank {place} has died during {what}", place) from None
            if "log" in message:
                logger.log(message["log"], "%s", message["message"])
            elif "error" in message:
                raise self._blame_or(place, message)
            else:
                return place, message

    def _blame_or(self, place: int, message: dict[str, Any]) -> MiniInferError:
        """What a rank raised; or that another one has died, or what that one raised, if that is why."""
        end = time.monotonic() + _AUTOPSY_SECONDS
        while time.monotonic() < end:
            for other, rank in enumerate(self._ranks):
                how = rank.how_it_ended()
                if other != place and how is not None and "killed" in how:
                    return self._blame(f"rank {other} has died", other)
                if message["lost_peer"] and rank.connection.poll():
                    with contextlib.suppress(EOFError, OSError):
                        said = unpack_message(rank.connection.recv_bytes())
                        place, message = (other, said) if "error" in said else (place, message)
            time.sleep(0.02)
        kind = getattr(exceptions, message["error"], None)
        text = (
            f"rank {place}: {message['message']}" if kind else f"rank {place}: {message['error']}: {message['message']}"
        )
        if isinstance(kind, type) and issubclass(kind, MiniInferError):
            return kind(text)
        return RankError(text)

    def _blame(self, what: str, place: int) -> RankError:
        end = time.monotonic() + _AUTOPSY_SECONDS
        rank = self._ranks[place]
        while rank.process is not None and rank.how_it_ended() is None and time.monotonic() < end:
            time.sleep(0.02)
        how, words = rank.how_it_ended(), rank.last_words()
        return RankError(what + (f": {how}" if how else "") + (f"; its last words:\n{words}" if words else ""))

    def _fail(self, what: str, place: int) -> BaseException:
        return self._restart(self._blame(what, place))

    def _restart(self, error: MiniInferError) -> BaseException:
        """After one has died: end them all, and start them anew unless that was done a moment ago. What to raise."""
        _end(self._ranks, kill=True)
        now = time.monotonic()
        is_again = self._last_restart is not None and now - self._last_restart < RESTART_INTERVAL
        if is_again or not self._launcher.can_restart:
            self._error = error if isinstance(error, RankError) else RankError(str(error))
            return self._error
        logger.warning("%s. The ranks are started anew, and what was under way is computed again", error)
        self._last_restart = now
        self._outputs.clear()
        self._num_answered = self._num_submitted
        try:
            self._start()
        except BaseException as second:
            _end(self._ranks, kill=True)
            self._error = RankError(f"{error}; and starting the ranks anew failed: {second}")
            return self._error if isinstance(second, Exception) else second
        return ExecutorRestarted(str(error))


def _end(ranks: list[RankProcess], kill: bool) -> None:
    """End ranks: all of them are told before one is waited for."""
    if not kill:
        for rank in ranks:
            rank.say_goodbye()
    for rank in ranks:
        rank.close(kill)
    ranks.clear()


def _close_all(ranks: list[RankProcess], launcher: Launcher) -> None:
    _end(ranks, kill=False)
    launcher.close()


def build_ranks(
    config: EngineConfig, directory: Path, model_config: ModelConfig, devices: Sequence[str]
) -> list[Local]:
    """Start the ranks of all replicas; raises as `RankExecutor`, and ``InvalidConfigError`` where the model cannot be
    shared out like that.

    Args:
        devices: one for each rank, in the order of the mesh.
    """
    check_layout(config, model_config)
    mesh = Mesh.of(config)
    launcher = _make_launcher(config, devices)
    each = mesh.ranks_per_replica

    def start(replica: int) -> RankExecutor:
        return RankExecutor(config, directory, devices[replica * each : (replica + 1) * each], launcher)

    with ThreadPoolExecutor(mesh.replicas) as pool:  # all load at once
        starting = [pool.submit(start, replica) for replica in range(mesh.replicas)]
    errors = [error for future in starting if (error := future.exception()) is not None]
    if errors:
        for future in starting:
            if future.exception() is None:
                future.result().close()
        launcher.close()
        raise errors[0]
    return [_local(future.result()) for future in starting]


def _make_launcher(config: ParallelOptions, devices: Sequence[str]) -> Launcher:
    if config.launch == "join":
        return Joined(config.rank_address, shared_key())
    if config.launch == "ray":
        from mini_infer.executor.launch_ray import RayActors

        return RayActors(devices)
    return ChildProcesses(len(devices))


def _local(executor: RankExecutor) -> Local:
    found = executor.found
    return Local(
        executor=executor,
        device=torch.device(found[0]["device"]),
        max_model_len=executor.max_model_len,
        num_gpu_blocks=executor.num_blocks,
        block_bytes=max(each["block_bytes"] for each in found),
        num_parameters=max(each["num_parameters"] for each in found),
    )


def check_layout(config: ParallelOptions, model_config: ModelConfig) -> None:
    """Refuse what cannot be shared out.

    Raises:
        InvalidConfigError: naming what can.
    """
    shards, stages = config.tensor_parallel_size, config.pipeline_parallel_size
    if shards * stages > 1:
        check_available()
    heads = {(layer.attention.num_heads, layer.attention.num_kv_heads) for layer in model_config.layers}
    widths = {layer.feed_forward.intermediate_size for layer in model_config.layers}
    most = min(model_config.vocab_size, *widths)

    def fits(size: int) -> bool:
        return size <= most and all(fits_heads(size, *counts) for counts in heads)

    if not fits(shards):
        possible = [size for size in range(1, max(count for count, _ in heads) + 1) if fits(size)]
        num_heads, num_kv_heads = max(heads)
        raise InvalidConfigError(
            f"tensor_parallel_size={shards}: a layer has {num_heads} query heads and {num_kv_heads} KV heads, which "
            f"can be shared out to {', '.join(map(str, possible))} devices; pipeline_parallel_size has no such limit"
        )
    if stages > model_config.num_layers:
        raise InvalidConfigError(
            f"pipeline_parallel_size={stages}: the model has {model_config.num_layers} layers, and each stage needs one"
        )


def lay_out(config: EngineConfig) -> tuple[EngineConfig, list[str]]:
    """The configuration with the number of replicas settled, and a device for each rank of all of them.

    Raises:
        InvalidConfigError: there are not as many, or more than that.
    """
    named = expand_devices(str(config.device))
    per_replica = Mesh.of(config).ranks_per_replica
    replicas = config.data_parallel_size or max(1, len(named) // per_replica)
    config = replace(config, data_parallel_size=replicas)
    size = replicas * per_replica
    if len(named) == 1 and size > 1:
        named = _as_many(named[0], size, config.launch != "processes")
    if len(named) != size:
        raise InvalidConfigError(
            f"device={config.device!r} names {len(named)} devices, and {replicas} replicas of {per_replica} ranks need "
            f"{size}; name as many, or change data_parallel_size, tensor_parallel_size or pipeline_parallel_size"
        )
    if config.launch == "processes":
        for name in named:
            resolve_device(name)
    return config, named


def _as_many(name: str, size: int, elsewhere: bool) -> list[str]:
    """Devices of one kind: GPUs, or where there are none ranks on the processor; never some of both."""
    num_gpus = torch.cuda.device_count()
    if elsewhere or name == "cpu" or (name == "auto" and num_gpus == 0):
        return [name] * size
    if name not in ("auto", "cuda"):
        return [name]
    if num_gpus < size:
        raise InvalidConfigError(
            f"{size} ranks were asked for and torch sees {num_gpus} GPUs; ask for fewer, or for device='cpu'"
        )
    return [f"cuda:{number}" for number in range(size)]
