"""What RMSNorm moves, counted inside PyTorch; and which places of a block the mask lets through."""

from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mini_infer.kernels import reference

READ, WRITTEN = "tab:blue", "tab:orange"
Text = Callable[[str, str], str]


class Traffic(TorchDispatchMode):
    """Bytes read and written by each operation that gives a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[tuple[int, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.moved.append((sum(x.nbytes for x in args if isinstance(x, Tensor)), out.nbytes))
        return out


def traffic(text: Text) -> Figure:
    x, weight = torch.randn(512, 1024).bfloat16(), torch.randn(1024).bfloat16()
    with Traffic() as counted:
        y = reference.norm.rmsnorm(x, weight, 1e-6)
    steps = [
        text("to float32", "转成 float32"),
        text("square", "平方"),
        text("mean", "求均值"),
        text("+ eps", "加 eps"),
        text("1 / sqrt", "开方取倒数"),
        text("times x", "乘 x"),
        text("to bfloat16", "转成 bfloat16"),
        text("times weight", "乘权重"),
    ]
    assert len(steps) == len(counted.moved), "the reference has other steps now"
    moved = [*counted.moved, (x.nbytes + weight.nbytes, y.nbytes)]
    labels = [*steps, text("one kernel", "一个算子")]
    places = [*range(len(steps)), len(steps) + 0.5]

    figure, axes = plt.subplots()
    read, written = ([numbers[i] / 1e6 for numbers in moved] for i in (0, 1))
    axes.barh(places, read, color=READ, label=text("read", "读"))
    axes.barh(places, written, left=read, color=WRITTEN, label=text("written", "写"))
    for place, total in zip(places, map(sum, moved), strict=True):
        axes.text(total / 1e6 + 0.05, place, f"{total / 1e6:.2f}", va="center")
    axes.axhline(len(steps) - 0.25, color="0.6", linewidth=1)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 5)
    axes.set_xlabel(
        text("MB moved, 512 rows of 1024 bfloat16 numbers", "搬运的数据量（MB），512 行，每行 1024 个 bfloat16")
    )
    total = sum(map(sum, counted.moved)) / 1e6
    axes.set_title(
        text(f"Eight operations move {total:.1f} MB", f"八个操作共搬运 {total:.1f} MB")
        + text(f", one kernel {sum(moved[-1]) / 1e6:.1f} MB", f"，一个算子只需 {sum(moved[-1]) / 1e6:.1f} MB")
    )
    axes.legend(loc="center right")
    return figure


def mask(text: Text) -> Figure:
    rows, size, block = 3, 5, 8
    col = torch.arange(block)
    inside = col < size

    figure, axes = plt.subplots(figsize=(7, 3))
    for row in range(rows):
        for c in range(block):
            colour, label = (READ, str(row * size + c)) if inside[c] else ("0.92", "0")
            axes.add_patch(plt.Rectangle((c, row), 0.94, 0.88, color=colour))
            axes.text(c + 0.47, row + 0.46, label, ha="center", va="center", color="white" if inside[c] else "0.45")
        axes.text(-0.3, row + 0.46, text(f"program {row}", f"程序 {row}"), ha="right", va="center")
    for c in range(block):
        axes.text(c + 0.47, -0.25, str(c), ha="center", va="center", color="0.3")
    axes.text(-0.3, -0.25, text("column", "列"), ha="right", va="center", color="0.3")
    axes.text(
        size / 2,
        rows + 0.3,
        text("inside: read and written", "掩码为真：读入并写回"),
        ha="center",
        va="center",
        color=READ,
    )
    axes.text(
        (size + block) / 2,
        rows + 0.3,
        text("outside: 0, not written", "掩码为假：读作 0，不写"),
        ha="center",
        va="center",
        color="0.4",
    )
    axes.set(xlim=(-2, block), ylim=(rows + 0.6, -0.6))
    axes.axis("off")
    axes.set_title(text("Blue: offset from x. Grey: memory not touched", "蓝格：相对 x 的偏移；灰格：不碰内存"))
    return figure


def draw(text: Text) -> dict[str, Figure]:
    return {"traffic": traffic(text), "mask": mask(text)}
