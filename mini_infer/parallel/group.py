"""What ranks say to each other in a step: five verbs over tensors, and the only use of torch.distributed.

`Alone` is a group of one, for whom every verb is the identity; so a layer says what it wants summed and never asks
whether there is anybody else.
"""

import os
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional

from mini_infer.exceptions import InvalidConfigError


class Group(Protocol):
    """Ranks that share each layer.

    Attributes:
        rank, size: which one this is, of how many.
        on_device: a sum is made by the device alone, without the host, so a CUDA graph can hold it.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def on_device(self) -> bool: ...

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all ranks' tensors, of one shape and dtype, on each of them. May reuse the memory of ``x``."""

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor | None:
        """The ranks' tensors ``[N, widths[rank]]`` side by side, on rank 0; None elsewhere. Widths differ by at most
        one, and do not rise."""

    def tell(self, x: Tensor) -> Tensor:
        """Rank 0's tensor, on each of them; the others give one of its shape and dtype."""


@dataclass(frozen=True, slots=True)
class Alone:
    """A group of one."""

    rank: int = 0
    size: int = 1
    on_device: bool = True

    def sum(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor | None:
        return x

    def tell(self, x: Tensor) -> Tensor:
        return x


ALONE = Alone()


@dataclass(frozen=True, slots=True)
class DistributedGroup:
    """Ranks in processes of their own.

    Attributes:
        rank, size: within the group.
        first: rank 0's number among all ranks of the replica.
        on_device: it is NCCL's.
        group: torch's own handle.
    """

    rank: int
    size: int
    first: int
    on_device: bool
    group: Any

    def sum(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor | None:
        widest, device = max(widths), x.device
        x = x if self.on_device else x.cpu()  # gloo adds and tells tensors of a GPU, and can do no more with them
        x = functional.pad(x, (0, widest - x.shape[-1])).contiguous()  # torch's own gather wants equal shapes
        pieces = [torch.empty_like(x) for _ in widths] if self.rank == 0 else None
        dist.gather(x, pieces, dst=self.first, group=self.group)
        if pieces is None:
            return None
        whole = torch.cat([piece[..., :width] for piece, width in zip(pieces, widths, strict=True)], dim=-1)
        return whole.to(device)

    def tell(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        dist.broadcast(x, src=self.first, group=self.group)
        return x


@dataclass(frozen=True, slots=True)
class Link:
    """The way from a stage to the next one, between ranks that have the same share of their layers.

    Attributes:
        before, after: the ranks there, among all of the replica; None at the ends.
        on_device: tensors are sent as they are, by NCCL; gloo takes those of a CPU.
    """

    before: int | None = None
    after: int | None = None
    on_device: bool = False
    _sent: list[tuple[Any, Tensor]] = field(default_factory=list)

    def send(self, x: Tensor) -> None:
        """To the next stage, without waiting until it has arrived: a copy, since the next step may overwrite ``x``."""
        assert self.after is not None
        while self._sent and self._sent[0][0].is_completed():
            self._sent.pop(0)
        x = x.to(x.device if self.on_device else "cpu", copy=True, memory_format=torch.contiguous_format)
        self._sent.append((dist.isend(x, self.after), x))

    def receive(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """What the stage before sent."""
        x = torch.empty(*shape, dtype=dtype, device=device if self.on_device else "cpu")
        dist.recv(x, self.before)
        return x.to(device)


def check_available() -> None:
    """Raises ``InvalidConfigError`` where ranks could not talk to each other."""
    if not dist.is_available() or not dist.is_gloo_available():
        raise InvalidConfigError(
            "tensor and pipeline parallelism need torch.distributed with gloo, which this build of torch lacks; "
            "data_parallel_size does not"
        )


class Store:
    """Where the ranks of a replica find each other, for as long as this object lives."""

    def __init__(self, host: str) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in every build of torch

        listening = socket.create_server((host, 0))  # a port that nobody else can take meanwhile
        self.port = listening.getsockname()[1]
        options: dict[str, Any] = {"use_libuv": False}
        if os.name == "nt":
            listening.close()
        else:
            options = {"master_listen_fd": listening.detach()}
        self._store = TCPStore(host, self.port, is_master=True, wait_for_workers=False, **options)


def join(
    store: tuple[str, int],
    rank: int,
    stages: int,
    shards: int,
    device: torch.device,
    interface: str,
    timeout: float,
) -> tuple[Group, Link]:
    """Meet the other ranks of the replica; returns once all are there.

    Args:
        store: address of the `Store`.
        rank: which of ``stages * shards`` this is.
        device: where its tensors are.
        interface: of the network, that reaches the others.
        timeout: seconds until one that says nothing is given up, which raises.

    Returns:
        Those that share its layers, and the way to the stages before and after.
    """
    if stages * shards == 1:
        return ALONE, Link()
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    size, waiting = stages * shards, timedelta(seconds=timeout)
    stage, shard = divmod(rank, shards)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, interface)
    options: dict[str, Any] = {"use_libuv": False} if os.name == "nt" else {}
    meeting = TCPStore(*store, is_master=False, timeout=waiting, **options)
    backend = "gloo"
    if device.type == "cuda" and dist.is_nccl_available() and _has_card_of_its_own(meeting, device, rank, size):
        backend = "nccl"
    dist.init_process_group(backend, store=meeting, rank=rank, world_size=size, timeout=waiting)
    on_device = backend == "nccl"
    link = Link(rank - shards if stage > 0 else None, rank + shards if stage < stages - 1 else None, on_device)
    if shards == 1:
        return ALONE, link
    groups = [dist.new_group(list(range(each * shards, (each + 1) * shards))) for each in range(stages)]
    return DistributedGroup(shard, shards, stage * shards, on_device, groups[stage]), link


def _has_card_of_its_own(store: Any, device: torch.device, rank: int, size: int) -> bool:
    """Whether no two ranks share a GPU, which NCCL refuses."""
    store.set(f"card {rank}", f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}")
    cards = {store.get(f"card {other}") for other in range(size)}
    return len(cards) == size


def interface_of(address: str) -> str:
    """The name of the network interface that has an IPv4 address; of the loopback interface if none is found."""
    names = [name for _, name in socket.if_nameindex()]
    try:
        import fcntl
    except ImportError:  # Windows, where gloo finds its own way
        return names[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name in names:
            try:
                answer = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
            except OSError:
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return "lo" if "lo" in names else "lo0"
