"""Grades `decode_attention`: step by step against a full recomputation in float64, and against the engine's own."""

import math
import random

import pytest
import torch
from torch import Tensor

SEED = 2


def recomputed(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention of a whole sequence, without a cache, one pair of numbers after another; float64.

    queries `[T, num_heads, head_dim]`, keys and values `[T, num_kv_heads, head_dim]`.
    """
    queries, keys, values = queries.double(), keys.double(), values.double()
    length, num_heads, head_dim = queries.shape
    group = num_heads // keys.shape[1]
    output = torch.zeros_like(queries)
    for t in range(length):
        for head in range(num_heads):
            scores = [float(queries[t, head] @ keys[j, head // group]) / math.sqrt(head_dim) for j in range(t + 1)]
            weights = [math.exp(score - max(scores)) for score in scores]
            for j, weight in enumerate(weights):
                output[t, head] += weight / math.fsum(weights) * values[j, head // group]
    return output


def tokens(length: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float64):
    """Queries, keys and values of a sequence, at random."""
    generator = torch.Generator().manual_seed(SEED)
    counts = (num_heads, num_kv_heads, num_kv_heads)
    return [
        torch.randn(length, count, head_dim, generator=generator, dtype=torch.float64).to(dtype) for count in counts
    ]


def generated(answer, queries: Tensor, keys: Tensor, values: Tensor, spare: int = 3) -> Tensor:
    """What the answer makes of the tokens, one step each, in caches whose unwritten rows are NaN."""
    caches = [torch.full((len(x) + spare, *x.shape[1:]), torch.nan, dtype=x.dtype) for x in (keys, values)]
    rows = []
    for t in range(len(queries)):
        output = answer.decode_attention(queries[t].clone(), keys[t].clone(), values[t].clone(), *caches, t)
        has_shape(output, queries[t])
        rows.append(output)
    return torch.stack(rows)


def has_shape(output: Tensor, query: Tensor) -> None:
    assert output is not None, "decode_attention returned None · decode_attention 返回了 None"
    got, wanted = list(output.shape), list(query.shape)
    assert got == wanted, f"the result has shape {got}, expected {wanted} · 结果的形状是 {got}，应为 {wanted}"


def close(output: Tensor, expected: Tensor, limit: float) -> None:
    """The relative error of every token and head is below a limit; NaN is infinitely wrong."""
    errors = ((output.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).nan_to_num(math.inf)
    token, head = divmod(int(errors.argmax()), errors.shape[1])
    error, got, wanted = float(errors.max()), begin(output[token, head]), begin(expected[token, head])
    assert error < limit, (
        f"token {token}, query head {head}: got {got}, expected {wanted}; relative error {error:.1e}, expected less "
        f"than {limit:.0e} · "
        f"词元 {token}，查询头 {head}：得到 {got}，应为 {wanted}；相对误差 {error:.1e}，应小于 {limit:.0e}"
    )


def begin(row: Tensor) -> str:
    return "[" + ", ".join(f"{x:.4g}" for x in row[:4].tolist()) + (", ...]" if len(row) > 4 else "]")


def test_first_token(answer, explain):
    """the first token of all · 第一个词元"""
    explain(
        "The cache is empty, and the only token that the first one can look at is itself: every weight is 1, so the "
        "result is its own value. A token always sees itself: its key and value must be in the cache before it "
        "attends. And nothing but its own row may be read, since the others are still NaN: rows that were never "
        "written do not count.",
        "缓存是空的，第一个词元只看得见自己：权重为 1，结果就是它自己的值。词元总是看得见自己，"
        "所以要先把它的键和值写进缓存，再做注意力。其余各行还是 NaN，从未写过的行一律不能读。",
    )
    queries, keys, values = tokens(1, 1, 1, 8)
    close(generated(answer, queries, keys, values), values, 1e-12)


def test_writes_the_cache(answer, explain):
    """what is in the cache afterwards · 算完之后缓存里有什么"""
    explain(
        "With num_cached tokens in the cache, rows 0 to num_cached - 1 are taken, so the new key and value belong in "
        "row num_cached: the row behind the last one, not one row too far. All other rows stay as they were.",
        "缓存里已有 num_cached 个词元，占第 0 到 num_cached - 1 行，新的键和值应写进第 num_cached 行，"
        "紧接在最后一行之后；不要写到再后一行去。其他各行保持原样。",
    )
    num_cached = 3
    queries, keys, values = tokens(6, 2, 2, 4)
    caches = [keys.clone(), values.clone()]
    new = [torch.full_like(x[0], 7.0) for x in (keys, values)]
    answer.decode_attention(queries[num_cached], *new, *caches, num_cached)
    for name, cache, before in (("key_cache", caches[0], keys), ("value_cache", caches[1], values)):
        changed = [row for row in range(len(cache)) if not torch.equal(cache[row], before[row])]
        assert changed == [num_cached], (
            f"{name}: rows {changed} have changed, expected [{num_cached}] · "
            f"{name}：改动的行是 {changed}，应为 [{num_cached}]"
        )
        row = cache[num_cached].flatten()
        assert (row == 7).all(), (
            f"{name}[{num_cached}] begins {begin(row)}, expected the new token's, 7 everywhere · "
            f"{name}[{num_cached}] 的开头是 {begin(row)}，应当是新词元的数，全为 7"
        )


def test_one_head(answer, explain):
    """one head, several tokens · 一个头，几个词元"""
    explain(
        "Two things are easily forgotten here. The scores must be divided by the square root of head_dim before the "
        "softmax. And the softmax runs over the keys: the weights of one query head sum to 1.",
        "这里有两处容易忘：softmax 之前，分数要除以 head_dim 的平方根；softmax 沿着键的方向做，"
        "同一个查询头对各个键的权重之和为 1。",
    )
    queries, keys, values = tokens(6, 1, 1, 16)
    close(generated(answer, queries, keys, values), recomputed(queries, keys, values), 1e-12)


def test_several_heads(answer, explain):
    """every head by itself · 各个头互不相干"""
    explain(
        "Four query heads, each with a KV head of its own. One head was right, several are not: does each use its own "
        "keys and values, and is the softmax over the keys, not over the heads?",
        "四个查询头，各有自己的 KV 头。一个头是对的，几个头就错了：每个头用的是自己的键和值吗？"
        "softmax 是沿着键、而不是沿着头做的吗？",
    )
    queries, keys, values = tokens(5, 4, 4, 8)
    close(generated(answer, queries, keys, values), recomputed(queries, keys, values), 1e-12)


def test_shared_heads(answer, explain):
    """query heads that share KV heads · 共用 KV 头"""
    explain(
        "Six query heads and two KV heads. Neighbours share: query heads 0, 1 and 2 use KV head 0; 3, 4 and 5 use KV "
        "head 1. Going around (0, 1, 0, 1, ...) is the usual mistake: each KV head must be repeated in place, the row "
        "of heads must not be laid out again and again.",
        "六个查询头，两个 KV 头。相邻的查询头共用一个：查询头 0、1、2 用 KV 头 0，3、4、5 用 KV 头 1。"
        "常见的错误是轮流使用（0、1、0、1……）：要让每个 KV 头就地重复，而不是把整排头反复铺开。",
    )
    queries, keys, values = tokens(5, 6, 2, 8)
    close(generated(answer, queries, keys, values), recomputed(queries, keys, values), 1e-12)


@pytest.mark.parametrize("case", range(8))
def test_random_shapes(answer, explain, case):
    """random shapes, against recomputing everything · 随机形状，与全部重算对照"""
    draw = random.Random(SEED + case)
    num_kv_heads = draw.choice([1, 2, 3])
    num_heads = num_kv_heads * draw.choice([1, 2, 4])
    head_dim, length = draw.choice([1, 5, 32]), draw.choice([1, 2, 9, 16])
    dtype, limit = draw.choice([(torch.float64, 1e-12), (torch.float32, 1e-5)])
    shape = f"{length} tokens, {num_heads} heads, {num_kv_heads} KV heads, head_dim {head_dim}, {dtype}"
    explain(
        f"{shape}, seed {SEED}; the caches are exactly as long as the sequence. Every step is compared with attention "
        "recomputed from scratch in float64.",
        f"{shape}（种子 {SEED}），缓存的容量恰好等于序列长度。每一步都与 float64 下从头重算的结果对照。",
    )
    queries, keys, values = tokens(length, num_heads, num_kv_heads, head_dim, dtype)
    output = generated(answer, queries, keys, values, spare=0)
    assert output.dtype is dtype, (
        f"the result is {output.dtype}, expected {dtype} · 结果的类型是 {output.dtype}，应为 {dtype}"
    )
    close(output, recomputed(queries, keys, values), limit)


def test_beside_the_engine(answer, explain):
    """beside the engine's own operation · 与引擎自己的算子对照"""
    explain(
        "The shape of the tutor, 8 query heads and 4 KV heads of 32, with 200 tokens in the cache, beside "
        "kernels.paged_attention with a single block that holds everything.",
        "按内置模型的形状：8 个查询头、4 个 KV 头、每头 32 维，缓存里有 200 个词元，与 kernels.paged_attention 对照，"
        "后者只用一个装得下全部内容的块。",
    )
    from mini_infer import kernels

    length = 200
    queries, keys, values = tokens(length + 1, 8, 4, 32, torch.float32)
    caches = [x.clone() for x in (keys, values)]
    output = answer.decode_attention(queries[length], keys[length], values[length], *caches, length)
    has_shape(output, queries[length])
    expected = kernels.paged_attention(
        queries[length:],
        keys[None],
        values[None],
        torch.zeros(1, 1, dtype=torch.int32),
        torch.tensor([length + 1], dtype=torch.int32),
    )
    close(output[None], expected.double(), 1e-5)
