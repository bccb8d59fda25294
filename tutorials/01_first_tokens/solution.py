"""Chapter 1: draw the next token with top-p, given one random number.
---
第 1 章：给定一个随机数，按 top-p 抽出下一个词元。
"""

import torch
from torch import Tensor


def sample_top_p(logits: Tensor, top_p: float, uniform: float) -> int:
    """The next token.

    1. Softmax turns the logits into probabilities.
    2. Keep the smallest set of the likeliest tokens whose probabilities together reach `top_p`.
    3. The others get probability 0; what remains is scaled so that it sums to 1 again.
    4. Lay the tokens side by side on the line from 0 to 1, in the order of their ids. Return the id of the one that
       `uniform` falls on: token i covers the numbers from where it begins up to, but without, where it ends.

    Compute in float64: the sums then differ from the exact ones by less than anybody can notice.

    Args:
        logits: `[vocab_size]`, any floating dtype.
        top_p: in (0, 1]; 1 keeps every token.
        uniform: in [0, 1).

    Returns:
        A token id, from 0 to vocab_size - 1.
    ---
    抽出下一个词元。

    1. 用 softmax 把 logits 变成概率。
    2. 从概率最高的词元开始保留，凑到总和不小于 `top_p` 为止，保留的词元要尽可能少。
    3. 其余词元的概率归零；保留下来的按比例放大，使总和重新等于 1。
    4. 把词元按编号从小到大首尾相接，排在 0 到 1 的线段上。返回 `uniform` 落在其上的那个词元的编号：
       每个词元占的区间含起点，不含终点。

    请用 float64 计算，累加的误差就小到可以忽略。

    参数：
        logits: `[vocab_size]`，任意浮点类型。
        top_p: 取值 (0, 1]；等于 1 时保留全部词元。
        uniform: 取值 [0, 1)。

    返回：
        词元编号，从 0 到 vocab_size - 1。
    """
    # hole
    probs = logits.double().softmax(dim=-1)
    ranked, order = probs.sort(descending=True)
    before = ranked.cumsum(dim=-1) - ranked
    probs[order[before >= top_p]] = 0
    cumulative = probs.cumsum(dim=-1)
    return int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    # end
