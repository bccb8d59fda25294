"""Which keys and values of a sequence stay, where a diffusion model's later steps compute some of its tokens alone.

Those tokens are to attend to the rest as it is now. To all of it, or to what matters most to them: what their mean
query scores highest, smoothed by taking the largest of three neighbours.

Song et al., Sparse-dLLM: Accelerating Diffusion LLMs with Dynamic Cache Eviction, 2025,
https://arxiv.org/abs/2508.02558
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from mini_infer.parallel.group import Group

_NEIGHBOURS = 3


@dataclass(frozen=True)
class Keep:
    """What stays of one sequence.

    Attributes:
        rows: its tokens, among the step's.
        start, end: those of them that later steps compute; what stays is of the others.
        by_head: each KV head keeps its own.
        slots: int64 ``[num_kept]``, where in the cache it goes.
    """

    rows: slice
    start: int
    end: int
    by_head: bool
    slots: Tensor


def select(query: Tensor, key: Tensor, value: Tensor, keep: Keep, group: Group) -> tuple[Tensor, Tensor]:
    """Keys and values that stay, ``[num_kept, K, D]`` each, in the order of the sequence.

    Args:
        query: ``[T, H, D]``, of the step.
        key, value: ``[T, K, D]``.
        group: who has the other heads.
    """
    query, key, value = (x[keep.rows] for x in (query, key, value))
    key, value, window = (
        *(torch.cat((x[: keep.start], x[keep.end :])) for x in (key, value)),
        query[keep.start : keep.end],
    )
    if len(keep.slots) == len(key):
        return key, value
    num_heads, head_dim = key.shape[1:]
    wide = torch.promote_types(key.dtype, torch.float32)
    mean = window.to(wide).mean(0).unflatten(0, (num_heads, -1))  # [K, H / K, D]
    scores = torch.einsum("kgd,nkd->kgn", mean, key.to(wide))
    scores = scores.amax(1) if keep.by_head else group.sum(scores.sum((0, 1)))[None]  # [K, N], or [1, N]
    scores = functional.max_pool1d(scores[None], _NEIGHBOURS, stride=1, padding=_NEIGHBOURS // 2)[0]
    best = scores.sort(descending=True, stable=True).indices[:, : len(keep.slots)].sort().values
    places = best.T.expand(-1, num_heads)[..., None].expand(-1, -1, head_dim)
    return key.gather(0, places), value.gather(0, places)
