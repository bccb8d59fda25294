"""Which stretch of something a rank has: layers, heads, rows of the vocabulary, features. Integers alone."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """Places ``start`` to ``stop`` (not included) of ``total``."""

    start: int
    stop: int
    total: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        return len(self) == self.total

    def times(self, factor: int) -> "Span":
        """The same stretch in finer units: of heads in features, say."""
        return Span(self.start * factor, self.stop * factor, self.total * factor)

    def of(self, length: int) -> slice:
        """The same stretch of something of another length.

        Raises:
            ValueError: its ends would lie within one of the places.
        """
        start, stop = self.start * length, self.stop * length
        if start % self.total or stop % self.total:
            raise ValueError(f"{self.start} to {self.stop} of {self.total} is no whole part of {length}")
        return slice(start // self.total, stop // self.total)

    def steps(self, step: int) -> slice:
        """Of something that has a place for each ``step`` of these, those that have to do with the stretch."""
        return slice(self.start // step, -(-self.stop // step))

    def cover(self, step: int) -> "Span":
        """The shortest stretch around this one that begins and ends at a multiple of ``step``, or with everything."""
        steps = self.steps(step)
        return Span(steps.start * step, min(steps.stop * step, self.total), self.total)

    def within(self, cover: "Span") -> "Span":
        """The same stretch, as a part of one around it."""
        return Span(self.start - cover.start, self.stop - cover.start, len(cover))


def whole(total: int) -> Span:
    """All of it."""
    return Span(0, total, total)


def fair(total: int, rank: int, size: int, unit: int = 1) -> Span:
    """A rank's share of ``total`` places, in units that are not divided: the first ranks have one unit more.

    The last unit may be short. Every rank has something where there are as many units as ranks.
    """
    each, rest = divmod(-(-total // unit), size)
    start = rank * each + min(rank, rest)
    stop = start + each + (rank < rest)
    return Span(min(start * unit, total), min(stop * unit, total), total)


def features(total: int, rank: int, size: int) -> Span:
    """A share of a feed-forward layer's features: in units of 64, which kernels like, or of less if there are few."""
    unit = math.gcd(total, 64)
    while unit > 1 and total // unit < size:
        unit //= 2
    return fair(total, rank, size, unit)


def kv_heads(num_kv_heads: int, rank: int, size: int) -> Span:
    """A share of the key and value heads. Where there are more ranks than heads, several ranks have a copy of one.

    Raises:
        ValueError: neither number divides the other.
    """
    if num_kv_heads % size and size % num_kv_heads:
        raise ValueError(f"{num_kv_heads} KV heads cannot be shared out to {size} ranks")
    start = rank * num_kv_heads // size
    return Span(start, start + max(1, num_kv_heads // size), num_kv_heads)


def layers(total: int, stage: int, stages: int) -> Span:
    """A stage's layers. What does not divide goes to stages in the middle: the first also embeds, and the last, which
    computes logits, gets one more only after all others."""
    each, rest = divmod(total, stages)
    favoured = [*range(1, stages - 1), 0, stages - 1][:rest]
    counts = [each + (place in favoured) for place in range(stages)]
    return Span(sum(counts[:stage]), sum(counts[: stage + 1]), total)


def fits_heads(size: int, num_heads: int, num_kv_heads: int) -> bool:
    """Whether a layer's heads can be shared out to so many ranks, each with whole groups of query heads."""
    return num_heads % size == 0 and (num_kv_heads % size == 0 or size % num_kv_heads == 0)
