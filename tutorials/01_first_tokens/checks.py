"""Grades `sample_top_p`: by hand-made cases, by an exhaustive search, and beside the engine."""

import math
import random
from collections import Counter

import pytest
import torch

SEED = 1


def logits_of(*probs: float) -> torch.Tensor:
    """Logits of these probabilities, none of which is 0."""
    return torch.tensor(probs, dtype=torch.float64).log()


def kept_tokens(probs: list[float], top_p: float) -> list[int]:
    """Token ids that top-p keeps, by taking one after another; in order of the ids."""
    kept: list[int] = []
    for token_id in sorted(range(len(probs)), key=probs.__getitem__, reverse=True):
        if top_p < 1 and math.fsum(probs[i] for i in kept) >= top_p:
            break
        kept.append(token_id)
    return sorted(kept)


def found(token_id: object) -> int:
    """The answer's result as an int."""
    assert token_id is not None, "sample_top_p returned None · sample_top_p 返回了 None"
    return int(token_id)


def draws(answer, logits: torch.Tensor, top_p: float, uniform: float, token_id: int) -> None:
    """The answer draws this token."""
    drawn = found(answer.sample_top_p(logits, top_p, uniform))
    assert drawn == token_id, (
        f"{len(logits)} tokens, top_p={top_p}, uniform={uniform}: got token {drawn}, expected {token_id} · "
        f"共 {len(logits)} 个词元，top_p={top_p}，uniform={uniform}：得到词元 {drawn}，应为 {token_id}"
    )


def test_all_tokens(answer, explain):
    """the whole distribution · 完整的分布"""
    explain(
        "With top_p=1 nothing is dropped. Token 0 covers [0, 0.5), token 1 [0.5, 0.75), token 2 [0.75, 1). Each number "
        "must give the token whose interval it is in; an interval has its beginning, not its end.",
        "top_p=1 时不去掉任何词元。词元 0 占 [0, 0.5)，词元 1 占 [0.5, 0.75)，词元 2 占 [0.75, 1)。"
        "随机数落在哪个区间，就返回哪个词元；区间含起点，不含终点。",
    )
    logits = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64) * math.log(2)
    for uniform, token_id in ((0.0, 0), (0.3, 0), (0.6, 1), (0.74, 1), (0.76, 2), (0.999, 2)):
        draws(answer, logits, 1.0, uniform, token_id)


def test_one_token(answer, explain):
    """a small p keeps one token · p 很小时只剩一个词元"""
    explain(
        "The favourite alone reaches this top_p, so it must always be drawn. Does your rule keep the token that "
        "crosses p, even when it is the first one?",
        "概率最高的词元自己就已达到 top_p，所以每次都该抽到它。使总和跨过 p 的那个词元也要保留，哪怕它就是第一个。",
    )
    for uniform in (0.0, 0.2, 0.9, 0.999):
        draws(answer, logits_of(0.7, 0.2, 0.1), 0.05, uniform, 0)


def test_smallest_set(answer, explain):
    """the smallest set that reaches p · 达到 p 的最小集合"""
    explain(
        "Probabilities 0.5, 0.3 and 0.2 with top_p=0.6: one token has 0.5, which is not enough; the token that "
        "crosses p is kept, so 0 and 1 stay, and 2 goes.",
        "概率是 0.5、0.3、0.2，top_p=0.6：只留一个词元，总和 0.5，还不够；使总和跨过 p 的那个词元也要保留，"
        "所以留下 0 和 1，去掉 2。",
    )
    drawn = {found(answer.sample_top_p(logits_of(0.5, 0.3, 0.2), 0.6, n / 100)) for n in range(100)}
    assert drawn == {0, 1}, (
        f"100 numbers drew tokens {sorted(drawn)}, expected [0, 1] · 100 个数抽到的词元是 {sorted(drawn)}，应为 [0, 1]"
    )
    explain(
        "Probabilities 0.5, 0.25 and 0.25 with top_p=0.5: the first token has reached p exactly, and that is enough. "
        "A set with one more is not the smallest.",
        "概率是 0.5、0.25、0.25，top_p=0.5：第一个词元的概率恰好等于 p，已经够了，再多留一个就不是最小的集合。",
    )
    logits = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64) * math.log(2)
    probs = logits.softmax(dim=-1)
    drawn = {found(answer.sample_top_p(logits, float(probs[0]), n / 100)) for n in range(100)}
    assert drawn == {0}, (
        f"100 numbers drew tokens {sorted(drawn)}, expected [0] · 100 个数抽到的词元是 {sorted(drawn)}，应为 [0]"
    )


def test_scaled_again(answer, explain):
    """what remains sums to one again · 剩下的概率重新归一"""
    explain(
        "Probabilities 0.5, 0.3 and 0.2 with top_p=0.6: tokens 0 and 1 remain, with 0.8 in all. Scaled to sum to 1 "
        "they are 0.625 and 0.375, so token 1 begins at 0.625. Without scaling the end of the line belongs to nobody.",
        "概率是 0.5、0.3、0.2，top_p=0.6：剩下词元 0 和 1，合计 0.8。按比例放大到总和为 1 之后是 0.625 和 0.375，"
        "所以词元 1 从 0.625 开始。如果忘了放大，线段末尾就有一截不属于任何词元。",
    )
    for uniform, token_id in ((0.1, 0), (0.55, 0), (0.62, 0), (0.63, 1), (0.81, 1), (0.99, 1)):
        draws(answer, logits_of(0.5, 0.3, 0.2), 0.6, uniform, token_id)


def test_order_of_ids(answer, explain):
    """ids, in their order · 按编号排列"""
    explain(
        "Here the likeliest token is not the first one. Two things go wrong easily: returning a token's rank instead "
        "of its id, and laying the tokens on the line by rank instead of in the order of their ids.",
        "这里概率最高的词元不排在最前。常见的错误有两个：返回了名次，而不是词元编号；或者在线段上按名次排列，而不是按编号排列。",
    )
    logits = logits_of(0.04, 0.26, 0.5, 0.2)
    for uniform, token_id in ((0.1, 1), (0.25, 1), (0.3, 2), (0.7, 2), (0.85, 3), (0.95, 3)):
        draws(answer, logits, 0.9, uniform, token_id)


def test_number_zero(answer, explain):
    """the number 0 · 随机数为 0"""
    explain(
        "uniform may be exactly 0, and here token 0 was dropped: its cumulative sum is 0 as well. The token looked "
        "for is the first whose cumulative sum is above the number, not the first that is at least as large.",
        "uniform 可能恰好是 0，而这里词元 0 已被去掉，它的累积和也是 0。"
        "要找的是第一个累积和大于（而不是大于等于）这个数的词元。",
    )
    draws(answer, logits_of(0.05, 0.15, 0.8), 0.9, 0.0, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_exhaustive_search(answer, explain, dtype):
    """random cases, against an exhaustive search · 随机用例，与穷举结果对照"""
    explain(
        f"Random logits in {dtype}, seed {SEED}, compared with a plain loop in float64. Logits may be very large; "
        "they must become float64 before anything is summed.",
        f"随机的 {dtype} logits（种子 {SEED}），与 float64 下逐个相加的结果对照。"
        "logits 可能很大；先转成 float64，再做累加。",
    )
    generator = torch.Generator().manual_seed(SEED)
    draw = random.Random(SEED)
    for _ in range(200):
        vocab_size = draw.choice([1, 2, 3, 17, 256])
        logits = torch.randn(vocab_size, generator=generator, dtype=torch.float64) * draw.choice([0.5, 2, 8, 500])
        logits = logits.to(dtype)
        top_p, uniform = draw.choice([1.0, draw.uniform(0.01, 1)]), draw.random()
        largest = float(logits.max())
        weights = [math.exp(float(z) - largest) for z in logits]
        probs = [weight / math.fsum(weights) for weight in weights]
        kept = kept_tokens(probs, top_p)
        ranked = sorted(probs, reverse=True)
        if len(set(ranked)) < vocab_size or near(ranked, top_p):
            continue  # whom to keep is a matter of rounding
        mass = math.fsum(probs[i] for i in kept)
        if near([probs[i] / mass for i in kept], uniform):
            continue  # so is whom it falls on
        total, expected = 0.0, kept[-1]
        for token_id in kept:
            total += probs[token_id] / mass
            if uniform < total:
                expected = token_id
                break
        draws(answer, logits, top_p, uniform, expected)


def near(probs: list[float], number: float) -> bool:
    """Whether one of the sums of the first few probabilities comes close to the number."""
    return any(abs(math.fsum(probs[: i + 1]) - number) < 1e-9 for i in range(len(probs) - 1))


def test_distribution(answer, explain):
    """how often each token is drawn · 每个词元被抽到的频率"""
    explain(
        "1,000 numbers, evenly spread from 0 to 1, must draw each kept token as often as its scaled probability says, "
        "to within one draw at each end of its interval, and the others never.",
        "把 0 到 1 均匀分成 1000 个数逐一代入：保留的词元被抽到的次数应与放大后的概率相符，"
        "误差不超过区间两端各一次；去掉的词元一次也不能抽到。",
    )
    count = 1000
    logits = torch.randn(20, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64) * 2
    probs = logits.softmax(dim=-1).tolist()
    for top_p in (0.3, 0.9, 1.0):
        drawn = Counter(found(answer.sample_top_p(logits, top_p, (n + 0.5) / count)) for n in range(count))
        kept = kept_tokens(probs, top_p)
        mass = math.fsum(probs[i] for i in kept)
        for token_id in range(len(probs)):
            expected = count * probs[token_id] / mass if token_id in kept else 0
            times = drawn[token_id]
            assert abs(times - expected) <= 2, (
                f"top_p={top_p}: token {token_id} was drawn {times} times, expected {expected:.1f} · "
                f"top_p={top_p}：词元 {token_id} 被抽到 {times} 次，应为 {expected:.1f} 次"
            )


def test_beside_the_engine(answer, explain):
    """a story beside the engine · 与引擎讲同一个故事"""
    explain(
        "The tutor tells a story with top_p=0.9. Given the same logits and the same random numbers, your function must "
        "draw the same tokens as the engine.",
        "内置模型用 top_p=0.9 讲一个故事。logits 相同、随机数相同，你的函数应当抽出与引擎相同的词元。",
    )
    from mini_infer import LLM, SamplingParams
    from mini_infer.random import uniforms

    llm = LLM(dtype="float32", max_num_seqs=1)
    vocab_size = llm.model_config.vocab_size
    params = SamplingParams(top_p=0.9, seed=SEED, max_tokens=8, logprobs=vocab_size)
    for prompt in ("Once upon a time, a", "从前有一只"):
        output = llm.generate(prompt, params, use_tqdm=False)[0]
        for position, entries in enumerate(output.logprobs, start=len(output.prompt_token_ids)):
            logits = torch.empty(vocab_size, dtype=torch.float64)
            for token_id, entry in entries.items():
                logits[token_id] = entry.logprob
            uniform = float(uniforms([SEED], [0], [position])[0])
            expected = output.token_ids[position - len(output.prompt_token_ids)]
            drawn = found(answer.sample_top_p(logits, 0.9, uniform))
            assert drawn == expected, (
                f"position {position}: got token {drawn}, the engine drew {expected} · "
                f"位置 {position}：得到词元 {drawn}，引擎抽到的是 {expected}"
            )
