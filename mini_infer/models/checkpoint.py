"""What weights are read from, whatever kind of file it is."""

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple, Protocol

from mini_infer.models.linear import Format, Read


class Stored(NamedTuple):
    """A tensor of a checkpoint, as the header of its file has it.

    Attributes:
        name: as checkpoints on the Hub call it.
        dtype: as safetensors spells it, or the name of a block type of GGUF.
    """

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str


class Checkpoint(Protocol):
    """The files of a model."""

    @property
    def stored(self) -> Mapping[str, Stored]:
        """Its tensors by name."""

    def reading(self, names: Collection[str]) -> AbstractContextManager[Read]:
        """What reads these tensors, while their files are open."""

    def format(self, matrix: str) -> Format:
        """How a matrix is written down, by its name without ``.weight``."""
