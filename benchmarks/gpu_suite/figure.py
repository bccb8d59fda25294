"""What a section of the suite yields, and what it is given."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One number that was measured, beside what it should reach.

    Attributes:
        what: measured of what.
        value: the number; None if it could not be taken, for the reason in `details["why"]`.
        unit: of the value.
        bar: what it should reach; None where nobody has said.
        at_most: whether the bar is an upper limit.
        details: what the number comes from (bytes, floor, time) and what stands beside it.
    """

    what: str
    value: float | None
    unit: str
    bar: float | None = None
    at_most: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """ "pass", "miss", "untaken", or nothing without a bar."""
        if self.value is None:
            return "untaken"
        if self.bar is None:
            return ""
        return "pass" if (self.value <= self.bar if self.at_most else self.value >= self.bar) else "miss"

    def to_dict(self) -> dict[str, Any]:
        """For the results file."""
        return asdict(self) | {"verdict": self.verdict}


def untaken(what: str, unit: str, why: object, bar: float | None = None) -> Figure:
    """A figure that could not be taken; an exception as the reason shows its kind."""
    reason = f"{type(why).__name__}: {why}" if isinstance(why, Exception) else str(why)
    return Figure(what, None, unit, bar, details={"why": reason.splitlines()[0][:300]})


@dataclass(frozen=True)
class Sizes:
    """How large everything is: `FULL` on a GPU, `TINY` to rehearse."""

    tokens: int  # of the row-wise operations
    small_batch: int
    large_batch: int
    context: int  # of decode attention
    long_context: int
    prompt: int
    parity: tuple[str, ...]  # sizes of the table of cases
    shape: str  # of the random checkpoint
    steps: tuple[tuple[int, int], ...]  # batch and context of the decode steps; the last is the one with the bar
    rounds: int
    requests: int
    lengths: tuple[int, int]  # of prompts and outputs
    vocabulary: int  # prompt ids are below
    peer_seconds: float


FULL = Sizes(
    tokens=16384,
    small_batch=32,
    large_batch=128,
    context=4096,
    long_context=32768,
    prompt=8192,
    parity=("medium", "large", "huge"),
    shape="qwen3-0.6b",
    steps=((1, 1024), (32, 1024), (32, 4096), (1, 32768), (256, 1024)),
    rounds=40,
    requests=256,
    lengths=(100, 1024),
    vocabulary=10_000,
    peer_seconds=75,
)
TINY = Sizes(
    tokens=8,
    small_batch=2,
    large_batch=3,
    context=40,
    long_context=70,
    prompt=64,
    parity=("small",),
    shape="tiny",
    steps=((1, 20), (4, 20)),
    rounds=3,
    requests=4,
    lengths=(4, 12),
    vocabulary=200,
    peer_seconds=30,
)


@dataclass(frozen=True)
class Context:
    """What a section works with: the sizes, and a random checkpoint of `sizes.shape`."""

    sizes: Sizes
    checkpoint: Path
