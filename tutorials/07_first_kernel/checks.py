import torch
import triton
from torch import Tensor

SEED = 7


def truth(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula in float64, row by row."""
    wide = x.double()
    return weight.double() * wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()


def close(out: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert out is not None, "rmsnorm returned None · rmsnorm 返回了 None"
    shape, expected = list(out.shape), list(wanted.shape)
    assert shape == expected, (
        f"the result has shape {shape}, expected {expected} · 结果的形状是 {shape}，应为 {expected}"
    )
    error = (out.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    row = int(error.nan_to_num(torch.inf).argmax())
    got, right = out.reshape(-1, out.shape[-1])[row], wanted.reshape(-1, out.shape[-1])[row]
    assert bool((error < tolerance).all()), (
        f"row {row}: got {begin(got)}, expected {begin(right)} · 第 {row} 行：得到 {begin(got)}，应为 {begin(right)}"
    )


def begin(row: Tensor) -> str:
    return "[" + ", ".join(f"{x:.5g}" for x in row[:6].tolist()) + (", ...]" if len(row) > 6 else "]")


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = SEED) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def launch(answer, x: Tensor, weight: Tensor, y: Tensor, num_rows: int, hidden_size: int, eps: float = 0.0) -> None:
    """The kernel by itself, on rows of a buffer."""
    block = triton.next_power_of_2(hidden_size)
    answer.rmsnorm_kernel[(num_rows,)](x, weight, y, hidden_size, hidden_size, eps, BLOCK=block)


def test_one_row(answer, explain):
    """one row that fills its block · 正好填满一块的一行"""
    explain(
        "One row of four numbers, weight 1, eps 0: x = [1, 1, 1, 1] has a mean square of 1 and must come back as it "
        "is; x = [1, 2, 3, 4] has a mean square of 30 / 4. If the result is too small by a factor that grows with the "
        "row, you divided by the sum of the squares and not by their mean. If y still holds NaN, nothing was stored.",
        "一行四个数，权重为 1，eps 为 0：x = [1, 1, 1, 1] 的平方均值是 1，应当原样返回；"
        "x = [1, 2, 3, 4] 的平方均值是 30 / 4。"
        "如果结果偏小，而且行越长小得越多，那是除以了平方和，而不是平方的均值。如果 y 里还是 NaN，说明什么也没有写回。",
    )
    for row in ([1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]):
        x, y = torch.tensor([row]), torch.full((1, 4), torch.nan)
        launch(answer, x, torch.ones(4), y, 1, 4)
        close(y, truth(x, torch.ones(4), 0.0), 1e-5)


def test_rows_and_weight(answer, explain):
    """many rows, and a weight · 多行，带权重"""
    explain(
        "Five rows of eight numbers: program r reads row r and writes row r. If all rows but the first are NaN, the "
        "row number is missing from an address. If the length of a row is right but its numbers are not, look at the "
        "weight: column c is multiplied by weight[c], in every row.",
        "五行，每行八个数：第 r 个程序读第 r 行，写第 r 行。如果除第一行外都是 NaN，说明某个地址里漏了行号。"
        "如果数量级对而数值不对，看看权重：每一行的第 c 列都要乘 weight[c]。",
    )
    x, weight, y = draw(5, 8), draw(8, seed=8), torch.full((5, 8), torch.nan)
    launch(answer, x, weight, y, 5, 8)
    close(y, truth(x, weight, 0.0), 1e-5)


def test_mask_of_loads(answer, explain):
    """rows shorter than the block: reading · 比块短的行：读"""
    explain(
        "One row of five numbers in a block of eight: behind the row there is NaN, which must not be read. Mask the "
        "loads, and let them give 0 outside: zeros add nothing to the sum of squares.",
        "一行五个数，块长为 8：行后面的内存里是 NaN，不该读到。给读取加上掩码，行外给 0：零对平方和没有贡献。",
    )
    x, weight, y = torch.full((8,), torch.nan), torch.full((8,), torch.nan), torch.full((8,), 7.0)
    x[:5], weight[:5] = draw(5), draw(5, seed=8)
    launch(answer, x, weight, y, 1, 5)
    assert y[:5].isfinite().all(), (
        f"got {begin(y[:5])}, expected five finite numbers · 得到 {begin(y[:5])}，应为五个有限的数"
    )
    explain(
        "The same row: what is behind it is no longer read, yet the numbers are wrong. The mean of a row is its sum "
        "divided by hidden_size, the numbers that it has, and not by BLOCK, the columns of the block.",
        "还是这一行：行后面的内存不再读到，数值却不对。"
        "均值是平方和除以 hidden_size（这一行真正有几个数），而不是除以 BLOCK（块有几列）。",
    )
    close(y[None, :5], truth(x[:5], weight[:5], 0.0)[None], 1e-5)


def test_mask_of_stores(answer, explain):
    """rows shorter than the block: writing · 比块短的行：写"""
    explain(
        "One row of five numbers in a block of eight: the three numbers behind y belong to somebody else, and were "
        "overwritten. On a GPU that is another row, whose program may have finished before. Mask the store, too.",
        "一行五个数，块长为 8：y 后面的三个数属于别人，却被覆盖了。"
        "在 GPU 上，那会是另一行的结果，它的程序也许早已写完。写回也要加掩码。",
    )
    x, weight, y = torch.zeros(8), torch.zeros(8), torch.full((8,), 7.0)
    x[:5], weight[:5] = draw(5), draw(5, seed=8)
    launch(answer, x, weight, y, 1, 5)
    assert y[5:].tolist() == [7.0, 7.0, 7.0], (
        f"behind y there is now {begin(y[5:])}, expected [7, 7, 7] as before · "
        f"y 后面现在是 {begin(y[5:])}，应当仍是 [7, 7, 7]"
    )


def test_eps(answer, explain):
    """eps is inside the root · eps 在根号里面"""
    explain(
        "A row of small numbers, about 0.001, with eps = 1e-6: their squares are as large as eps, so its place "
        "matters. It is added to the mean of the squares, inside the root, before the root is taken.",
        "一行小数，大约 0.001，eps = 1e-6：平方与 eps 一样大，eps 放在哪里就很要紧。"
        "它加在平方的均值上，在根号里面，先加再开方。",
    )
    x, weight = draw(4, 16) * 1e-3, draw(16, seed=8)
    close(answer.rmsnorm(x, weight, 1e-6), truth(x, weight, 1e-6), 1e-5)
    explain(
        "A row of zeros must give zeros: eps keeps the division finite.",
        "全零的一行应当得到全零：eps 就是为了不让除数为零。",
    )
    out = answer.rmsnorm(torch.zeros(2, 8), torch.ones(8), 1e-6)
    assert torch.equal(out, torch.zeros(2, 8)), (
        f"the first row is {begin(out[0])}, expected zeros · 第一行是 {begin(out[0])}，应当全为 0"
    )


def test_shapes(answer, explain):
    """all sizes from 1 to 40 · 1 到 40 的各种长度"""
    for hidden_size in range(1, 41):
        explain(
            f"Rows of {hidden_size} numbers, three of them, seed {SEED}, through your function rmsnorm. Shorter rows "
            "were right.",
            f"三行，每行 {hidden_size} 个数，随机种子 {SEED}，通过你的 rmsnorm 函数。更短的行都对。",
        )
        x, weight = draw(3, hidden_size), draw(hidden_size, seed=8)
        close(answer.rmsnorm(x, weight, 1e-6), truth(x, weight, 1e-6), 1e-5)


def test_strides(answer, explain):
    """rows with a gap between them · 行与行之间有空隙"""
    explain(
        "Rows of five numbers that begin nine elements apart, as a slice of a wider tensor has them. Row r of x "
        "begins at r * x_stride; only y's rows lie close together.",
        "每行五个数，行与行的起点却相隔九个元素，切自更宽的张量时就会这样。"
        "x 的第 r 行从 r * x_stride 开始；只有 y 的各行才紧挨着。",
    )
    x, weight = draw(6, 9)[:, 2:7], draw(5, seed=8)
    close(answer.rmsnorm(x, weight, 1e-6), truth(x, weight, 1e-6), 1e-5)


def test_half_precision(answer, explain):
    """arithmetic in float32 · 用 float32 计算"""
    explain(
        "float16 numbers of about 500, whose squares are beyond float16's largest number, 65504. Load, then make "
        "float32 of it, and only then square and sum.",
        "大约 500 的 float16 数，平方超出了 float16 的最大值 65504。读入之后先转成 float32，再平方、求和。",
    )
    x, weight = (draw(3, 24) * 500).half(), draw(24, seed=8).half()
    close(answer.rmsnorm(x, weight, 1e-6), truth(x, weight, 1e-6), 1e-2)
    explain(
        "bfloat16, rows of 2048 numbers: with 8 significant bits, a long sum of squares stops growing. Make float32 of "
        "what is loaded before squaring and summing it.",
        "bfloat16，每行 2048 个数：只有 8 位有效数字，长长的平方和加到后来就不再增长。"
        "读入之后先转成 float32，再平方、求和。",
    )
    x, weight = draw(3, 2048).bfloat16(), draw(2048, seed=8).bfloat16()
    out = answer.rmsnorm(x, weight, 1e-6)
    assert out.dtype == torch.bfloat16, (
        f"the result is {out.dtype}, expected torch.bfloat16 · 结果的类型是 {out.dtype}，应为 torch.bfloat16"
    )
    close(out, truth(x, weight, 1e-6), 1e-2)


def test_parity(parity):
    """the project's parity tests · 项目的一致性测试"""
    parity("rmsnorm")
