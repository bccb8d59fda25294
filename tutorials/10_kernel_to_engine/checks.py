import functools
from collections import Counter

import torch
from torch import Tensor

from mini_infer import LLM, kernels

OP, SEED = "silu_and_mul", 10


def truth(x: Tensor) -> Tensor:
    gate, up = x.double().chunk(2, dim=-1)
    return gate * gate.sigmoid() * up


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).to(dtype)


def mine(x: Tensor) -> Tensor:
    """The public operation on the reader's backend, as the engine calls it."""
    with kernels.use_backend("mine"):
        return kernels.silu_and_mul(x)


def close(out: Tensor, x: Tensor, tolerance: float = 1e-5) -> None:
    wanted = truth(x)
    assert out is not None, "silu_and_mul returned None · silu_and_mul 返回了 None"
    has_shape(out, list(wanted.shape))
    assert out.dtype == x.dtype, f"the result is {out.dtype}, expected {x.dtype} · 结果是 {out.dtype}，应为 {x.dtype}"
    error = float((out.double() - wanted).norm() / wanted.norm())
    assert error < tolerance, (
        f"got {begin(out)}, expected {begin(wanted)}; relative error {error:.1e}, expected less than {tolerance:.0e} · "
        f"得到 {begin(out)}，应为 {begin(wanted)}；相对误差 {error:.1e}，应小于 {tolerance:.0e}"
    )


def has_shape(out: Tensor, wanted: list[int]) -> None:
    shape = list(out.shape)
    assert shape == wanted, f"the result has shape {shape}, expected {wanted} · 结果的形状是 {shape}，应为 {wanted}"


def begin(x: Tensor) -> str:
    return "[" + ", ".join(f"{value:.5g}" for value in x.flatten()[:6].tolist()) + ", ...]"


def test_registered(answer, explain):
    """registered as "mine" · 注册为 mine"""
    explain(
        "The registry does not know your function: above it there must be a decorator that names the operation, "
        "silu_and_mul, and the backend, mine. It is written in chapter 7's skeleton, for another operation.",
        "注册表还不认识你的函数：它上面要有一个装饰器，写明操作 silu_and_mul 和后端 mine。"
        "第 7 章的骨架里有一个，只是操作不同。",
    )
    backends = kernels.available_backends(OP, "cpu")
    assert "mine" in backends, (
        f"the backends of {OP} are {backends}, expected mine among them · {OP} 的后端是 {backends}，其中应当有 mine"
    )
    explain(
        "Your backend runs although nobody asked for it. The highest priority wins where no backend is named; leave "
        "yours at the default.",
        "没有人点名，你的后端却被用上了。没有指定后端时，优先级最高的胜出；你的保持默认值就好。",
    )
    with kernels.use_backend(None):
        assert kernels.backend_of(OP) != "mine", (
            f"with no backend named, {OP} runs on mine, expected another · 没有点名时 {OP} 用了 mine，应当用别的后端"
        )


def test_a_few_rows(answer, explain):
    """three rows of gate and up · 三行 gate 与 up"""
    explain(
        "Three rows of ten numbers: the first five are the gate, the last five are multiplied with it, and the result "
        "has three rows of five. The kernel's size is what a row of the result has.",
        "三行，每行十个数：前五个是 gate，后五个与它相乘，结果是三行，每行五个。算子的参数 size 是结果一行的长度。",
    )
    close(mine(draw(3, 10)), draw(3, 10))


def test_the_last_block(answer, explain):
    """rows of more than one block · 一行不止一块"""
    explain(
        "Rows of 300 results, in blocks of 256: what lies beyond the last full block needs a program, too. Round up "
        "the number of blocks: triton.cdiv.",
        "每行 300 个结果，每块 256 个：最后一个整块之后剩下的部分也要有程序负责。块数要向上取整：triton.cdiv。",
    )
    close(mine(draw(2, 600)), draw(2, 600))
    close(mine(draw(2, 1024)), draw(2, 1024))


def test_leading_shape(answer, explain):
    """any leading shape · 任意多维"""
    explain(
        "x may have any leading shape: here [2, 3, 8], then [8] alone. The number of rows is the product of all "
        "dimensions but the last.",
        "x 前面可以有任意多维：这里先是 [2, 3, 8]，再是单独的 [8]。行数是除最后一维外各维的乘积。",
    )
    close(mine(draw(2, 3, 8)), draw(2, 3, 8))
    close(mine(draw(8)), draw(8))


def test_empty(answer, explain):
    """nothing to do · 没有事做"""
    explain(
        "Here x is an empty tensor: [0, 8], then [3, 0]. The result is empty as well ([0, 4] and [3, 0]), and there is "
        "nothing to launch: a grid of no programs is an error.",
        "这里 x 是空张量：先是 [0, 8]，再是 [3, 0]。结果也是空的（[0, 4] 与 [3, 0]），"
        "不必启动算子：没有程序的网格会出错。",
    )
    has_shape(mine(torch.empty(0, 8)), [0, 4])
    has_shape(mine(torch.empty(3, 0)), [3, 0])


def test_x_is_the_callers(answer, explain):
    """x stays as it was · 不改动 x"""
    explain(
        "x belongs to the caller, and was changed, or is part of the result. The result is a tensor of its own.",
        "x 属于调用者，却被改动了，或者成了结果的一部分。结果应当是另一个独立的张量。",
    )
    x = draw(3, 10)
    out = mine(x)
    before = draw(3, 10)
    assert torch.equal(x, before), (
        f"x is now {begin(x)}, expected {begin(before)} as before · x 变成了 {begin(x)}，应当仍是 {begin(before)}"
    )
    assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr(), (
        "the result lies in x's memory, expected memory of its own · 结果就在 x 的内存里，应当有自己的内存"
    )


def test_strides(answer, explain):
    """any strides · 任意步长"""
    explain(
        "Rows with a gap between them, as a slice of a wider tensor has them: a row begins rows.stride(0) elements "
        "after the one before, which is more than it has numbers.",
        "行与行之间有空隙，切自更宽的张量时就会这样：每行比前一行晚 rows.stride(0) 个元素开始，这比一行的长度要大。",
    )
    wide = draw(4, 20)
    close(mine(wide[:, 3:13]), wide[:, 3:13])
    explain(
        "A transposed x: the columns of a row are not neighbours in memory, and the kernel reads neighbours. Copy such "
        "an x first (contiguous).",
        "转置过的 x：同一行相邻的列，在内存里并不相邻，而算子读的是相邻的内存。"
        "先复制这样的 x（contiguous），让各列在内存里也相邻。",
    )
    close(mine(draw(10, 4).T), draw(10, 4).T)


def test_dtypes(answer, explain):
    """16, 32 and 64 bits · 16、32 与 64 位"""
    for dtype in (torch.bfloat16, torch.float16):
        explain(f"The result has x's dtype, here {dtype}.", f"结果的类型与 x 相同，这里是 {dtype}。")
        close(mine(draw(3, 50, dtype=dtype)), draw(3, 50, dtype=dtype), 1e-2)
    explain(
        "float64 has to be right to twelve places, and the kernel computes in float32. Leave it to the reference.",
        "float64 要精确到十二位，而算子用 float32 计算。请把它交给参考实现。",
    )
    close(mine(draw(3, 50).double()), draw(3, 50).double(), 1e-12)


def test_parity(parity):
    """the project's parity tests · 项目的一致性测试"""
    parity(OP)


def test_engine(answer, explain):
    """a model runs on it · 用它运行模型"""
    explain(
        "The bundled model, in float32, on your backend and on the reference: both must generate the same tokens. All "
        "small cases were right, so look at what only an engine does: one row or many, again and again.",
        "在 float32 下，分别用你的后端和参考实现运行内置模型，生成的词元必须相同。"
        "小用例都已通过，想想只有引擎才会做的事：时而一行、时而多行，反复调用。",
    )
    calls: Counter[str] = Counter()

    @functools.wraps(answer.silu_and_mul)
    def counted(x: Tensor) -> Tensor:
        calls["mine"] += 1
        return answer.silu_and_mul(x)

    kernels.register(OP, backend="mine")(counted)
    tokens = {}
    for backend in ("reference", "mine"):
        llm = LLM(kernel_backend=backend, dtype="float32")
        outputs = llm.generate(["The KV cache", "分页注意力"], max_tokens=6, temperature=0, use_tqdm=False)
        tokens[backend] = [output.token_ids for output in outputs]
    assert calls["mine"], "the engine never called it, expected many calls · 引擎一次也没有调用它，应当调用多次"
    assert tokens["mine"] == tokens["reference"], (
        f"got {tokens['mine']}, expected {tokens['reference']} · 得到 {tokens['mine']}，应为 {tokens['reference']}"
    )
