"""Grades chapter 8's kernel: pairs, angles and masks one at a time, then the project's parity tests."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

SEED = 8
Explain = Callable[[str, str], None]


def tables(half: int, max_positions: int = 64) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(max_positions).double(), 100.0 ** -(torch.arange(half) / max(half, 1)))
    return angles.cos().float(), angles.sin().float()


def truth(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> Tensor:
    """Each pair as a complex number, times cos + i sin, in float64."""
    half, out = cos.shape[1], x.double()
    turn = torch.complex(cos[positions].double(), sin[positions].double())[:, None]
    turned = torch.complex(out[..., :half], out[..., half : 2 * half]) * turn
    return torch.cat((turned.real, turned.imag, out[..., 2 * half :]), dim=-1)


def turn_and_compare(
    answer: ModuleType, q: Tensor, k: Tensor, cos_and_sin: tuple[Tensor, Tensor], positions: Tensor
) -> None:
    cos, sin = cos_and_sin
    turned = answer.apply_rotary_emb(q, k, cos, sin, positions, False)
    for name, x, out in zip("qk", (q, k), turned, strict=True):
        wanted = truth(x, cos, sin, positions)
        wrong = ~torch.isclose(out.double(), wanted, rtol=1e-4, atol=1e-5)
        token, head, feature = map(int, torch.unravel_index(wrong.int().argmax(), wrong.shape))  # the first
        position, half = int(positions[token]), cos.shape[1]
        got, right = f"{out[token, head, feature]:.5f}", f"{wanted[token, head, feature]:.5f}"
        assert not wrong.any(), (
            f"{name}: token {token} at position {position}, head {head}, feature {feature} of {x.shape[-1]} "
            f"(half = {half}): got {got}, expected {right} (seed {SEED}) · "
            f"{name}：词元 {token}，位置 {position}，头 {head}，特征 {feature}，共 {x.shape[-1]} 个特征"
            f"（half = {half}）：得到 {got}，应为 {right}（种子 {SEED}）"
        )


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))


def test_one_pair(answer: ModuleType, explain: Explain) -> None:
    """One pair of features · 一对特征"""
    cos, sin = torch.tensor([[0.6]]), torch.tensor([[0.8]])
    pair = torch.tensor([[[1.0, 0.0]]])
    explain(
        "One head with one pair (a, b) = (1, 0), and tables of one row: cos = 0.6, sin = 0.8. It must become (0.6, "
        "0.8). (1, 0) means that the kernel stored nothing; (0.6, -0.8) that it turned backwards: look at the two "
        "signs of the formula; (0.6, 0.48) that b' was computed from a': both results need the old a.",
        "一个头、一对特征 (a, b) = (1, 0)，两张表只有一行：cos = 0.6，sin = 0.8。结果应为 (0.6, 0.8)。若得到 (1, "
        "0)，说明算子什么也没写；若得到 (0.6, -0.8)，说明转到了反方向，请核对公式里的两个正负号；若得到 (0.6, "
        "0.48)，说明算 b' 时用了 a'：两个结果都要用旧的 a。",
    )
    out, _ = answer.apply_rotary_emb(pair, pair, cos, sin, torch.tensor([0]), False)
    got = tuple(round(x, 4) for x in out[0, 0].tolist())
    assert got == pytest.approx((0.6, 0.8), abs=1e-4), f"got {got}, expected (0.6, 0.8) · 得到 {got}，应为 (0.6, 0.8)"


def test_pairs(answer: ModuleType, explain: Explain) -> None:
    """Four pairs, half-split · 四对特征，前后两半配对"""
    explain(
        "One head of eight features, four pairs. The two features of a pair lie half apart: (0, 4), (1, 5), (2, 6), "
        "(3, 7), and not next to each other. Pair i uses column i of both tables.",
        "一个头，八个特征，四对。同一对的两个特征相隔 half：(0, 4)、(1, 5)、(2, 6)、(3, 7)，而不是左右相邻。第 i 对"
        "用两张表的第 i 列。",
    )
    cos, sin = tables(4)
    turn_and_compare(answer, draw(1, 1, 8), draw(1, 1, 8), (cos[3:4], sin[3:4]), torch.tensor([0]))


def test_positions(answer: ModuleType, explain: Explain) -> None:
    """Tokens at positions of their own · 每个词元有自己的位置"""
    explain(
        "Four tokens of a flat batch, at positions 5, 0, 6 and 5. The row of the tables is position_ids[token]; the "
        "token's place in the batch says nothing about it.",
        "拼成一行的批里有四个词元，位置分别是 5、0、6、5。查表用的行号是 position_ids[token]，与词元在批里排第几无关。",
    )
    turn_and_compare(answer, draw(4, 1, 4), draw(4, 1, 4), tables(2), torch.tensor([5, 0, 6, 5]))


def test_mask(answer: ModuleType, explain: Explain) -> None:
    """Three pairs, and features that do not turn · 三对特征，另有不旋转的特征"""
    explain(
        "Heads of ten features of which six turn: half = 3, the tile has HALF = 4 columns, and features 6 to 9 must "
        "stay as they are. A feature beyond the pairs changed, or one within was lost: is there a mask on every "
        "load and on every store, `pair < half` for the tables and `inside` for the heads?",
        "每个头十个特征，只有六个旋转：half = 3，瓦片却有 HALF = 4 列，第 6 到 9 个特征应当原样保留。现在有不该动的"
        "特征变了，或者该转的丢了：每次读写都带掩码了吗？读表用 `pair < half`，读写头用 `inside`。",
    )
    turn_and_compare(answer, draw(2, 2, 10), draw(2, 1, 10), tables(3), torch.tensor([4, 7]))


def test_heads(answer: ModuleType, explain: Explain) -> None:
    """Three query heads on one key head · 三个查询头配一个键头"""
    explain(
        "Three query heads in a tile of four rows, and one key head. All heads of a token turn by the same angles; "
        "the fourth row does not exist and must neither be read nor written.",
        "三个查询头放在四行的瓦片里，另有一个键头。同一词元的各个头转同样的角度；第四行并不存在，既不能读，也不能写。",
    )
    turn_and_compare(answer, draw(3, 3, 8), draw(3, 1, 8), tables(4), torch.tensor([1, 9, 30]))


def test_strides(answer: ModuleType, explain: Explain) -> None:
    """Views into one projection · 同一个投影里的视图"""
    explain(
        "q and k are views into one tensor, as the engine's fused projection gives them: from one token to the next "
        "it is further than num_heads * head_dim. Find x by token_stride and head_stride; only out is contiguous.",
        "q 与 k 是同一个张量的视图，引擎里合并的投影给出的就是这样：相邻词元的间隔大于 num_heads * head_dim。读 x 要"
        "用步长 token_stride 和 head_stride，只有 out 才是连续的。",
    )
    both = draw(3, 6, 8)
    turn_and_compare(answer, both[:, :4], both[:, 4:], tables(4), torch.tensor([1, 2, 40]))


def test_float32(answer: ModuleType, explain: Explain) -> None:
    """bfloat16 heads and tables · bfloat16 的头与表"""
    explain(
        "Heads and tables in bfloat16. Convert whatever you load to float32 before you compute; tl.store rounds back.",
        "头与表都是 bfloat16。读进来的数先转成 float32 再计算，tl.store 会负责舍入回去。",
    )
    q, (cos, sin), positions = draw(4, 2, 64).bfloat16(), tables(32), torch.tensor([1, 17, 33, 60])
    cos, sin = cos.bfloat16(), sin.bfloat16()
    out, _ = answer.apply_rotary_emb(q, q, cos, sin, positions, False)
    wanted = truth(q, cos, sin, positions)
    error = float((out.double() - wanted).norm() / wanted.norm())
    assert error < 5e-3, (
        f"relative error {error:.1e} in bfloat16, expected less than 5e-3 (seed {SEED}) · "
        f"bfloat16 下的相对误差是 {error:.1e}，应小于 5e-3（种子 {SEED}）"
    )


def test_parity(parity: Callable[[str], None]) -> None:
    """The project's parity tests · 项目的一致性测试"""
    parity("apply_rotary_emb")
