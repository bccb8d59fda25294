"""What a layer keeps of the tokens that it has seen, as far as memory is concerned."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # sizes are needed where there is no torch
    import torch


@dataclass(frozen=True)
class PagedKV:
    """Keys and values of every token, in blocks.

    Attributes:
        num_kv_heads: key and value heads.
        head_dim: features of a head.
        dtype: of both; one of 8 bits are codes, with a scale of 16 bits for each token and head.
    """

    num_kv_heads: int
    head_dim: int
    dtype: "torch.dtype"

    @property
    def bytes_per_token(self) -> int:
        scale = 2 if self.dtype.itemsize == 1 else 0
        return 2 * self.num_kv_heads * (self.head_dim * self.dtype.itemsize + scale)


def block_bytes(specs: Iterable[PagedKV], block_size: int) -> int:
    """Bytes of one block: what all layers keep of ``block_size`` tokens."""
    return block_size * sum(spec.bytes_per_token for spec in specs)
