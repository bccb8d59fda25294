"""Grades chapter 9's kernel: one idea at a time, then the project's parity tests, then the tutor speaks through it."""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

SEED = 9
UNUSED = 100.0  # what lies in slots that belong to nobody
Explain = Callable[[str, str], None]


class Case:
    """Sequences of the given lengths, their blocks shuffled over a cache; spare slots and table entries hold junk."""

    def __init__(
        self,
        lengths: list[int],
        *,
        block_size: int = 32,
        kv_heads: int = 1,
        group: int = 1,
        head_dim: int = 16,
        unused: float = UNUSED,
    ) -> None:
        self.generator = torch.Generator().manual_seed(SEED)
        self.lengths, self.group = lengths, group
        needed = [-(-length // block_size) for length in lengths]
        num_blocks = sum(needed) + 2
        self.tables = torch.zeros(len(lengths), max(needed) + 1, dtype=torch.int32)
        ids = torch.randperm(num_blocks - 1, generator=self.generator).int() + 1  # block 0 is nobody's
        for row, blocks in zip(self.tables, needed, strict=True):
            row[:] = ids[-1]  # beyond the sequence's own blocks: somebody else's
            row[:blocks], ids = ids[:blocks], ids[blocks:]
        self.keys = torch.full((num_blocks, block_size, kv_heads, head_dim), unused)
        self.values = torch.full_like(self.keys, unused)
        for s, length in enumerate(lengths):
            for cache in (self.keys, self.values):
                cache[self.slots(s)] = self.draw(length, kv_heads, head_dim)
        self.query = self.draw(len(lengths), kv_heads * group, head_dim)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def slots(self, s: int) -> tuple[Tensor, Tensor]:
        """Where the tokens of sequence s lie: their blocks, and their places in them."""
        token, block_size = torch.arange(self.lengths[s]), self.keys.shape[1]
        return self.tables[s].long()[token // block_size], token % block_size

    def truth(self, scale: float) -> tuple[Tensor, Tensor]:
        """The formula, one sequence and one query head at a time, in float64; and how far float32 may be off.

        Whatever the order of its sums, float32 rounds by 2⁻²⁴ of the sizes that are added, for each addition: head_dim
        of them make a score, an error there changes a weight by as large a share, and its total by that share again.
        """
        out = self.query.double()
        bounds = torch.empty(out.shape[:2], dtype=torch.float64)
        for s in range(len(self.lengths)):
            keys, values = self.keys[self.slots(s)].double(), self.values[self.slots(s)].double()
            for head in range(out.shape[1]):
                shared = head // self.group
                query = self.query[s, head].double()
                weights = (scale * keys[:, shared] @ query).softmax(0)
                out[s, head] = weights @ values[:, shared]
                size = (scale * keys[:, shared].abs() @ query.abs()).max()
                additions = 2 * size * (query.numel() + 4) + 2 * self.lengths[s] + 8
                bounds[s, head] = additions * 2**-24 * (weights @ values[:, shared].abs()).norm()
        return out, bounds

    def compare(self, answer: ModuleType, scale: float | None = None) -> None:
        scale = self.query.shape[-1] ** -0.5 if scale is None else scale
        lengths = torch.tensor(self.lengths, dtype=torch.int32)
        out = answer.paged_attention(self.query, self.keys, self.values, self.tables, lengths, scale, None)
        wanted, bounds = self.truth(scale)
        wrong = ~((out.double() - wanted).norm(dim=-1) <= bounds)
        s, head = map(int, torch.unravel_index(wrong.int().argmax(), wrong.shape))  # the first
        length, block_size = self.lengths[s], self.keys.shape[1]
        got, right = begin(out[s, head]), begin(wanted[s, head])
        assert not wrong.any(), (
            f"sequence {s} with {length} tokens in blocks of {block_size}, query head {head}: got {got}, expected "
            f"{right} (seed {SEED}) · "
            f"序列 {s}，{length} 个词元，每块 {block_size} 个，查询头 {head}：得到 {got}，应为 {right}（种子 {SEED}）"
        )


def begin(row: Tensor) -> str:
    return "[" + ", ".join(f"{x:.4f}" for x in row[:4].tolist()) + ", ...]"


def test_mean(answer: ModuleType, explain: Explain) -> None:
    """A query of zeros: the mean of the values · 查询全为零：各个值的平均"""
    explain(
        "One sequence, one head, 32 tokens: exactly one block and one tile. The query is zero, so all scores are 0 "
        "and the result is the mean of the values. Zeros mean that total and weighted never changed. NaN means a "
        "correction that is upside down: in the first tile the old top is -inf, and exp(old top - new top) is 0. "
        "Anything else: are block id and offset right?",
        "一个序列、一个头、32 个词元：正好一块，也正好一片瓦片。查询全为零，所以分数都是 0，结果是各个值的平均。结果"
        "为零，说明 total 与 weighted 从未更新。出现 NaN，说明校正系数写反了：第一片的旧最高分是 -inf，exp(旧最高分 "
        "- 新最高分) 等于 0。其他情况，请检查块编号与偏移。",
    )
    case = Case([32])
    case.query.zero_()
    case.compare(answer)


def test_softmax(answer: ModuleType, explain: Explain) -> None:
    """One full tile · 一片装满的瓦片"""
    explain(
        "The same 32 tokens with a real query and a scale of 0.3. The weights are the softmax of scale * query · "
        "key. Was the scale forgotten, or used twice? Do the weights stand beside the values of the same tokens?",
        "还是 32 个词元，查询不再为零，scale 为 0.3。权重是 scale * query · key 的 softmax。是不是漏了 scale，或者乘"
        "了两次？权重与值对应的是同一批词元吗？",
    )
    Case([32]).compare(answer, scale=0.3)


def test_kv_heads(answer: ModuleType, explain: Explain) -> None:
    """Six query heads on two KV heads · 六个查询头配两个 KV 头"""
    explain(
        "Two KV heads, each shared by three query heads: 0, 1, 2 read KV head 0, and 3, 4, 5 read KV head 1. A head "
        "came out with the wrong KV head: program (seq, kv_head) must step kv_head times the head stride into the "
        "keys, and into the values too.",
        "两个 KV 头，各由三个查询头共用：0、1、2 读 KV 头 0，3、4、5 读 KV 头 1。现在有查询头读错了 KV 头：程序 "
        "(seq, kv_head) 读键时要跨过 kv_head 个头的步长，读值时也一样。",
    )
    Case([32], kv_heads=2, group=3).compare(answer)


def test_block_edges(answer: ModuleType, explain: Explain) -> None:
    """Lengths around the edge of a block · 块边界前后的长度"""
    explain(
        "Five sequences whose lengths lie around the edge of a block of 32. Slots beyond the context hold large "
        "numbers that must not count. Is the mask off by one? The tokens of the context are 0 to end - 1, and a "
        "token that is not visible needs a score of -inf; with 0 it would still weigh exp(0).",
        "五个序列，长度恰好在块（32 个词元）的边界前后。上下文之外的槽位里放着很大的数，不能算进去。掩码是否差一？上"
        "下文的词元是 0 到 end - 1；看不见的词元分数应为 -inf，若为 0，权重还有 exp(0)。",
    )
    Case([31, 32, 33, 1, 64]).compare(answer)


def test_rescaling(answer: ModuleType, explain: Explain) -> None:
    """A top that rises from tile to tile · 最高分逐片升高"""
    explain(
        "150 tokens in several tiles, whose scores rise along the way. Whenever the top rises, whatever was summed "
        "under the old top must be rescaled by exp(old top - new top): the total and also weighted, before this "
        "tile's part is added. In the first tile the old top is -inf and the correction 0.",
        "150 个词元分成几片瓦片，分数一路升高。每当最高分升高，按旧最高分累加的结果都要按 exp(旧最高分 - 新最高分) "
        "缩放：total 要，weighted 也要，而且要在加上这一片之前。第一片的旧最高分是 -inf，校正系数为 0。",
    )
    case = Case([150])
    case.keys[case.slots(0)] = case.query[0] * torch.linspace(0.2, 1.0, 150)[:, None, None]
    case.compare(answer)


def test_falling_scores(answer: ModuleType, explain: Explain) -> None:
    """A top in the first tile · 最高分在第一片"""
    explain(
        "150 tokens whose highest score comes first. The new top is the maximum of the old top and this tile's "
        "scores: it never falls.",
        "150 个词元，最高分出现在最前面。新的最高分是旧最高分与这一片各分数中的最大者，只升不降。",
    )
    case = Case([150])
    case.keys[case.slots(0)] = case.query[0] * torch.linspace(12.0, 0.2, 150)[:, None, None]
    case.compare(answer)


def test_large_scores(answer: ModuleType, explain: Explain) -> None:
    """Scores of several hundred · 几百的分数"""
    explain(
        "Scores of several hundred. exp(100) overflows float32, so a weight is exp(score - top): at most 1.",
        "分数高达几百。exp(100) 已超出 float32 的范围，所以权重要写成 exp(score - top)，最大为 1。",
    )
    case = Case([40])
    case.query *= 30
    case.keys[case.slots(0)] *= 10
    case.compare(answer)


def test_block_sizes(answer: ModuleType, explain: Explain) -> None:
    """Blocks of 1, 5 and 64 tokens, heads of 20 features · 每块 1、5、64 个词元，每头 20 个特征"""
    explain(
        "Blocks that are smaller than a tile, larger, and no power of two; heads of 20 features in a tile of 32 "
        "columns. Every token has a block of its own, table[token // BLOCK_SIZE], and an offset, token % "
        "BLOCK_SIZE. Features from HEAD_DIM on must be loaded as 0.",
        "有的块比瓦片小，有的比瓦片大，还有的不是 2 的幂；每头 20 个特征，瓦片却有 32 列。每个词元各自对应一块 "
        "table[token // BLOCK_SIZE] 和一个偏移 token % BLOCK_SIZE。HEAD_DIM 及以后的特征要读成 0。",
    )
    for block_size in (1, 5, 64):
        Case([70, 3, 41], block_size=block_size, kv_heads=2, group=2, head_dim=20).compare(answer)


def test_unused_slots(answer: ModuleType, explain: Explain) -> None:
    """NaN in unused slots · 闲置槽位里是 NaN"""
    explain(
        "Unused slots hold NaN. A weight of 0 does not silence it, since 0 * NaN is NaN: mask the loads of keys and "
        "of values with what is visible, so that they give 0 there.",
        "闲置槽位里是 NaN。权重为 0 也压不住它，因为 0 * NaN 还是 NaN：读键和读值时都要按是否看得见加掩码，让那里读"
        "出 0。",
    )
    Case([5, 33], unused=float("nan")).compare(answer)


def test_parity(parity: Callable[[str], None]) -> None:
    """The project's parity tests · 项目的一致性测试"""
    parity("paged_attention")


def test_the_tutor_speaks(answer: ModuleType, explain: Explain) -> None:
    """The bundled model decodes with it · 内置模型用它来解码"""
    from mini_infer import LLM

    explain(
        "The bundled model, with your kernel in all six layers, must answer as it does with the reference.",
        "内置模型的六层都换上你的算子，回答应当与使用参考实现时一样。",
    )
    texts = []
    for backend in ("reference", "mine"):
        llm = LLM(kernel_backend=backend, dtype="float32", max_num_seqs=1, num_gpu_blocks=8)
        chat = [{"role": "user", "content": "What is paged attention?"}]
        texts.append(llm.chat(chat, max_tokens=8, temperature=0, use_tqdm=False)[0].text)
    assert texts[1] == texts[0], f"got {texts[1]!r}, expected {texts[0]!r} · 得到 {texts[1]!r}，应为 {texts[0]!r}"
