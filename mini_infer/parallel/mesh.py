"""Which device computes what, when there are several: integers alone.

The devices of an engine are numbered in one row. Neighbours share layers (tensor parallelism), whose traffic is
heaviest; groups of these follow each other as stages (pipeline parallelism); whole replicas (data parallelism) come
last, and say nothing to each other:

    dp = 2, pp = 2, tp = 2      replica 0: stage 0 [0 1]  stage 1 [2 3]      replica 1: stage 0 [4 5]  stage 1 [6 7]
"""

from dataclasses import dataclass
from typing import NamedTuple

from mini_infer.config import ParallelOptions


class Place(NamedTuple):
    """Where a device stands: in which replica, in which stage of it, and which share of that stage's layers it has."""

    replica: int
    stage: int
    shard: int


@dataclass(frozen=True, slots=True)
class Mesh:
    """How many there are of each.

    Attributes:
        replicas, stages, shards: the sizes of data, pipeline and tensor parallelism.
    """

    replicas: int = 1
    stages: int = 1
    shards: int = 1

    @classmethod
    def of(cls, options: ParallelOptions) -> "Mesh":
        """What a configuration asks for."""
        return cls(options.data_parallel_size or 1, options.pipeline_parallel_size, options.tensor_parallel_size)

    @property
    def ranks_per_replica(self) -> int:
        return self.stages * self.shards

    @property
    def size(self) -> int:
        return self.replicas * self.ranks_per_replica

    def place(self, device: int) -> Place:
        """Where a device of the row stands.

        Raises:
            ValueError: there is no such device.
        """
        if not 0 <= device < self.size:
            raise ValueError(f"there are {self.size} devices, and number {device} is none of them")
        replica, rank = divmod(device, self.ranks_per_replica)
        return Place(replica, *divmod(rank, self.shards))

    def device(self, place: Place) -> int:
        """The device at a place; the inverse of ``place``."""
        return (place.replica * self.stages + place.stage) * self.shards + place.shard
