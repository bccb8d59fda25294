"""A rank's share of a model."""

from dataclasses import dataclass, field

from mini_infer.parallel import slices
from mini_infer.parallel.group import ALONE, Group, Link
from mini_infer.parallel.slices import Span


@dataclass(frozen=True, slots=True)
class Share:
    """Which part of the model a rank has: some of its layers, and of each of these a share.

    Attributes:
        group: those who share the same layers.
        stage, stages: which of the stages these layers are.
    """

    group: Group = ALONE
    stage: int = 0
    stages: int = 1

    @property
    def is_whole(self) -> bool:
        return self.stages * self.group.size == 1

    @property
    def is_first(self) -> bool:
        """It embeds."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """It computes logits."""
        return self.stage == self.stages - 1

    def layers(self, total: int) -> Span:
        return slices.layers(total, self.stage, self.stages)

    def heads(self, total: int) -> Span:
        return slices.fair(total, self.group.rank, self.group.size)

    def kv_heads(self, total: int) -> Span:
        return slices.kv_heads(total, self.group.rank, self.group.size)

    def features(self, total: int) -> Span:
        return slices.features(total, self.group.rank, self.group.size)

    def tokens(self, vocab_size: int) -> Span:
        """Rows of the vocabulary."""
        return slices.fair(vocab_size, self.group.rank, self.group.size)

    def token_widths(self, vocab_size: int) -> list[int]:
        """How many rows each rank of the group has."""
        return [len(slices.fair(vocab_size, rank, self.group.size)) for rank in range(self.group.size)]


WHOLE = Share()


@dataclass(frozen=True, slots=True)
class Peers:
    """A rank's share of the model, and the way to whoever has the layers before and after."""

    share: Share = WHOLE
    link: Link = field(default_factory=Link)
