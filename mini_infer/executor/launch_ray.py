"""Starting ranks with Ray, on whatever machines its cluster has; and the only use of Ray.

Ray places: it finds room for all ranks at once, and starts an actor for each. An actor calls back and is then a rank as
if somebody had started it by hand; what is said in a step does not go by way of Ray.
"""

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

try:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
except ImportError as error:
    from mini_infer.exceptions import InvalidConfigError

    raise InvalidConfigError("launch='ray' needs Ray: pip install 'mini-infer[ray]'") from error

from mini_infer.exceptions import InvalidConfigError, RankError
from mini_infer.executor.launch import Joined, RankProcess, thread_limits
from mini_infer.executor.launch import call as call_driver

PLACEMENT_SECONDS = 60.0
"""How long the cluster may take to make room."""

_GLANCE_SECONDS = 1.0
"""How often to look whether an actor that has not called yet has failed, and how long a machine may take to answer."""


@dataclass
class RayRank(RankProcess):
    """A rank in an actor.

    Attributes:
        group: Ray's handle of the room that its replica has.
    """

    group: Any = None

    def close(self, kill: bool) -> None:
        super().close(kill)
        _give_back(self.group)


class _Actor:
    """What Ray starts."""

    def serve(self, address: str, key: bytes, device: str | None, num_threads: int, timeout: float) -> None:
        """Be a rank; never returns."""
        from mini_infer.executor.rank import serve

        os.environ.update(thread_limits(num_threads))  # before torch is imported
        connection, machine = call_driver(address, key, timeout)
        serve(connection, machine, device)


class RayActors:
    """Ranks as actors of the Ray cluster that this process belongs to; of one on this machine if there is none.

    Args:
        devices: one for each rank of all replicas, of one kind: "cuda", "cpu", or "auto", which is GPUs if the cluster
            has any.

    Raises:
        InvalidConfigError: the cluster does not have as many.
    """

    def __init__(self, devices: Sequence[str]) -> None:
        self._machines: dict[str, int] = {}
        self._lock = threading.Lock()
        self._started_ray = not ray.is_initialized()
        if self._started_ray:
            ray.init(log_to_driver=False, logging_level="ERROR")
        try:
            self._bundle = _bundle(devices)
            self.host = ray.util.get_node_ip_address()
            self._key = secrets.token_bytes(32)
            self._joined = Joined(f"{self.host}:0", self._key)
        except BaseException:
            self._leave()
            raise

    @property
    def can_restart(self) -> bool:
        """Whether all machines that have had ranks can be reached. Ray learns after half a minute that one cannot, and
        would have whoever asks for room wait for it."""
        return all(_is_there(machine, port) for machine, port in self._machines.items())

    def launch(self, size: int, timeout: float) -> list[RankProcess]:
        deadline = time.monotonic() + timeout
        ports = {node["NodeManagerAddress"]: node["NodeManagerPort"] for node in ray.nodes() if node["Alive"]}
        group = self._place(size)
        kind = ray.remote(max_restarts=0, max_concurrency=1)(_Actor)
        ranks: list[RankProcess] = []
        actors: list[Any] = []
        try:
            for place in range(size):
                strategy = PlacementGroupSchedulingStrategy(group, place)
                cpus, gpus = self._bundle["CPU"], self._bundle.get("GPU", 0)
                actors.append(kind.options(num_cpus=cpus, num_gpus=gpus, scheduling_strategy=strategy).remote())
            device = "cuda" if "GPU" in self._bundle else "cpu"
            address = f"{self.host}:{self._joined.port}"
            with self._lock:  # replicas start at the same time, and who calls is one of those that were told to
                for place, actor in enumerate(actors):
                    call = actor.serve.remote(address, self._key, device, int(self._bundle["CPU"]), timeout)
                    joined = self._accept(call, deadline, place, size)
                    ranks.append(RayRank(joined.connection, machine=joined.machine, group=group))
            self._machines |= {rank.machine: ports[rank.machine] for rank in ranks if rank.machine in ports}
        except BaseException:
            for rank in ranks:
                rank.close(kill=True)
            _give_back(group)
            raise
        return ranks

    def _accept(self, call: Any, deadline: float, place: int, size: int) -> RankProcess:
        """The connection of the actor that was called, unless that has failed."""
        while True:
            try:
                return self._joined.accept(min(deadline, time.monotonic() + _GLANCE_SECONDS), place, size)
            except RankError:
                if not ray.wait([call], timeout=0)[0] and time.monotonic() < deadline:
                    continue
                try:
                    ray.get(call, timeout=0)
                except ray.exceptions.GetTimeoutError:
                    pass
                except Exception as error:
                    raise RankError(f"the actor of rank {place} has failed: {error}") from None
                raise

    def _place(self, size: int) -> Any:
        """Room for a replica's ranks, on as few machines as there can be."""
        group = ray.util.placement_group([self._bundle] * size, strategy="PACK")
        if not group.wait(PLACEMENT_SECONDS):
            _give_back(group)
            free = {kind: count for kind, count in ray.available_resources().items() if kind in ("CPU", "GPU")}
            raise RankError(
                f"Ray has found no room for {size} ranks of {self._bundle} within {PLACEMENT_SECONDS:.0f} seconds; "
                f"free are {free}. Something else uses the cluster: see `ray status`"
            )
        return group

    def close(self) -> None:
        self._joined.close()
        self._leave()

    def _leave(self) -> None:
        if self._started_ray:
            ray.shutdown()


def _is_there(machine: str, port: int) -> bool:
    """Whether a machine answers, if only to say that nobody listens there."""
    try:
        socket.create_connection((machine, port), _GLANCE_SECONDS).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True


def _give_back(group: Any) -> None:
    """Room that is needed no more. Ray kills whatever runs there."""
    with contextlib.suppress(Exception):  # Ray may have ended before, at exit
        ray.util.remove_placement_group(group)


def _bundle(devices: Sequence[str]) -> dict[str, float]:
    """What a rank needs of the cluster: a GPU, or its share of the processors, as whole cores of one machine.

    Raises:
        InvalidConfigError: there is not so much.
    """
    size = len(devices)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    num_gpus, num_cores = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("GPU", "CPU"))
    (kind,) = {device.partition(":")[0] for device in devices}
    if kind == "cuda" or (kind == "auto" and num_gpus):
        wanted, there, bundle = "GPUs", num_gpus, {"CPU": 1.0, "GPU": 1.0}
    else:
        possible = [cores for cores in range(1, num_cores + 1) if _fit(nodes, cores) >= size]
        wanted, there, bundle = "cores", num_cores, {"CPU": float(max(possible, default=1))}
    if there < size:
        raise InvalidConfigError(
            f"launch='ray': {size} ranks need as many {wanted}, and the cluster has {there}; add machines with "
            "`ray start --address=...`, or ask for fewer ranks"
        )
    return bundle


def _fit(nodes: Sequence[dict[str, float]], cores: int) -> int:
    """How many ranks of so many cores there is room for."""
    return sum(int(node.get("CPU", 0)) // cores for node in nodes)
