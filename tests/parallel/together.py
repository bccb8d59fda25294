"""Ranks as threads of one process, whose sums are made in the order of the ranks: what real ranks are held against."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass
class _Table:
    """Where the ranks put what they have to say."""

    size: int
    pieces: list[Tensor] = field(init=False)
    barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        self.pieces = [torch.empty(0)] * self.size
        self.barrier = threading.Barrier(self.size, timeout=60)

    def exchange(self, rank: int, x: Tensor, use: Callable[[list[Tensor]], T]) -> T:
        self.pieces[rank] = x
        self.barrier.wait()
        used = use(list(self.pieces))
        self.barrier.wait()
        return used


@dataclass(eq=False)
class ThreadGroup:
    rank: int
    table: _Table
    on_device: bool = False

    @property
    def size(self) -> int:
        return self.table.size

    def sum(self, x: Tensor) -> Tensor:
        def add(pieces: list[Tensor]) -> Tensor:
            total = pieces[0].clone()
            for piece in pieces[1:]:
                total += piece
            return total

        return self.table.exchange(self.rank, x, add)

    def gather(self, x: Tensor, widths: Sequence[int]) -> Tensor | None:
        assert x.shape[-1] == widths[self.rank]
        return self.table.exchange(self.rank, x, lambda pieces: torch.cat(pieces, -1) if self.rank == 0 else None)

    def tell(self, x: Tensor) -> Tensor:
        return self.table.exchange(self.rank, x, lambda pieces: pieces[0].clone())


@dataclass
class Corridor:
    """From one stage to the next within a process: what is sent waits until it is taken."""

    sent: deque[Tensor] = field(default_factory=deque)

    def send(self, x: Tensor) -> None:
        self.sent.append(x.clone())

    def receive(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        x = self.sent.popleft()
        assert (tuple(x.shape), x.dtype) == (tuple(shape), dtype)
        return x


def together(size: int, work: Callable[[ThreadGroup], T]) -> list[T]:
    """What each of ``size`` ranks makes, in their order."""
    table = _Table(size)

    def run(rank: int) -> T:
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                return work(ThreadGroup(rank, table))
        except BaseException:
            table.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(run, rank) for rank in range(size)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error
        return [future.result() for future in futures]
