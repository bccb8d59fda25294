"""Chapter 14: a feed-forward layer that several ranks share. Fill in the body of feed_forward.
---
第 14 章：几个 rank 分摊一个前馈层。填写 feed_forward 的函数体。
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import silu


def feed_forward(
    x: Tensor, up, down, bias: Tensor, rank: int, size: int, sum_over_ranks: Callable[[Tensor], Tensor]
) -> Tensor:
    """silu(x Uᵀ) Dᵀ + b, by ``size`` ranks together, each of which has some of the features.

    All ranks call this at the same time, with the same x, and each must return the complete result [tokens, hidden].

    up:   U [features, hidden], in a file: up.shape, and up[rows, columns] reads what two slices say
    down: D [hidden, features], likewise
    bias: b [hidden]
    rank, size: which rank this is, 0 to size - 1, and how many there are
    sum_over_ranks: gives each rank the sum of what all of them gave it; it costs a message, so call it once

    To do, in this order:
    1. the rank's stretch of the features: shares in a row, and what is left over goes to the first ranks, one each
    2. the rows of U for these features: the rank's own activations, complete, so silu can be applied to them
    3. the columns of D for these features: the rank's contribution to every output
    4. the bias, once in all
    5. the sum
    ---
    由 size 个 rank 一起计算 silu(x Uᵀ) Dᵀ + b，每个 rank 负责一部分特征。

    所有 rank 同时调用这个函数，x 相同；每个 rank 都要返回完整的结果 [tokens, hidden]。

    up：   U [features, hidden]，在文件里：up.shape 是形状，up[rows, columns] 读出两个切片所指的部分
    down： D [hidden, features]，同上
    bias： b [hidden]
    rank, size：这是第几个 rank（0 到 size - 1），一共有几个
    sum_over_ranks：各个 rank 给出一个张量，每个 rank 都得到它们的和；调用一次就是一次通信，所以只调用一次

    依次要做的事：
    1. 这个 rank 的那一段特征：各段首尾相接，除不尽的部分归前几个 rank，一个分一个
    2. U 中这些特征对应的行：得到本 rank 自己的激活，它们是完整的，可以直接做 silu
    3. D 中这些特征对应的列：得到本 rank 对每个输出的贡献
    4. 偏置，总共只加一次
    5. 求和
    """
    # hole
    total = up.shape[0]
    each, rest = divmod(total, size)
    start = rank * each + min(rank, rest)
    mine = slice(start, start + each + (rank < rest))
    activations = silu(x @ up[mine, :].T)
    result = activations @ down[:, mine].T
    if rank == 0:
        result = result + bias
    return sum_over_ranks(result)
    # end
