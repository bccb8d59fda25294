"""The pictures of chapter 9: a walk along a block table, and how splitting turns length into width."""

from collections.abc import Callable

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from mini_infer.kernels.triton.launch import Device
from mini_infer.kernels.triton.paged_attention import MIN_SHARE, splits

COLOURS = ["tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:olive"]


def draw(text: Callable[[str, str], str]) -> dict[str, Figure]:
    return {"walk": walk(text), "splits": splitting(text)}


def walk(text: Callable[[str, str], str]) -> Figure:
    """Tiles over logical blocks, and where the block table says that those lie."""
    context, block_size, tile, num_blocks = 77, 16, 32, 12
    table = [7, 2, 9, 4, 0]
    figure, axes = plt.subplots()
    axes.set_xlim(-1, 97)
    axes.set_ylim(0, 10)
    axes.axis("off")

    def box(x: float, y: float, width: float, height: float, label: str, **style: object) -> None:
        axes.add_patch(Rectangle((x, y), width, height, **{"edgecolor": "black", "linewidth": 0.8, **style}))
        axes.text(x + width / 2, y + height / 2, label, ha="center", va="center", fontsize=9)

    axes.text(0, 9.5, text("tiles of the kernel: 32 tokens", "算子的瓦片：每片 32 个词元"), fontsize=10)
    for i, start in enumerate(range(0, context, tile)):
        seen = min(tile, context - start)
        box(start, 8.2, seen, 0.9, text(f"tile {i}", f"瓦片 {i}"), facecolor="0.92")
        if seen < tile:
            box(start + seen, 8.2, tile - seen, 0.9, text("masked", "掩码"), facecolor="white", hatch="///", alpha=0.5)
    axes.text(0, 7.3, text("the context: 77 tokens, in blocks of 16", "上下文：77 个词元，每块 16 个"), fontsize=10)
    width = 96 / num_blocks
    for logical, physical in enumerate(table):
        start, colour = logical * block_size, COLOURS[logical]
        seen = min(block_size, context - start)
        box(start, 6.0, seen, 0.9, f"{start}–{start + seen - 1}", facecolor=colour, alpha=0.45)
        box(start + block_size / 2 - 3, 3.9, 6, 0.9, str(physical), facecolor="white")
        axes.annotate("", (start + block_size / 2, 4.9), (start + block_size / 2, 5.95), arrowprops={"arrowstyle": "-"})
        axes.annotate(
            "",
            (physical * width + width / 2, 1.75),
            (start + block_size / 2, 3.85),
            arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 1.5},
        )
    axes.text(82, 4.2, text("block table", "块表"), fontsize=10)
    for physical in range(num_blocks):
        colour = COLOURS[table.index(physical)] if physical in table else "white"
        box(physical * width, 0.8, width, 0.9, str(physical), facecolor=colour, alpha=0.45 if physical in table else 1)
    axes.text(0, 0.15, text("the cache: blocks of all sequences", "缓存：所有序列的块"), fontsize=10)
    return figure


def splitting(text: Callable[[str, str], str]) -> Figure:
    """One sequence on an H200, by the engine's own rule: programs, and tokens that the busiest of them walks."""
    h200, kv_heads, tile = Device(shared_memory=227 * 1024, num_sms=132, tensor_cores=True), 8, 64
    contexts = [2**power for power in range(8, 18)]
    shares = [splits(1, kv_heads, context, h200) for context in contexts]
    longest = [
        max(-(-context // (count * tile)) * tile, MIN_SHARE.value)
        for context, count in zip(contexts, shares, strict=True)
    ]
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(7, 4.6))
    whole, split = text("one program per KV head", "每个 KV 头一个程序"), text("split", "拆分上下文")
    above.plot(contexts, [kv_heads] * len(contexts), "o-", color="tab:orange", label=whole)
    above.plot(contexts, [kv_heads * count for count in shares], "s-", color="tab:blue", label=split)
    above.axhline(h200.num_sms, color="0.5", linestyle="--", linewidth=1)
    above.text(256, h200.num_sms * 1.15, text("132 multiprocessors", "132 个流多处理器"), color="0.35", fontsize=9)
    above.set_ylabel(text("programs", "程序数"))
    below.plot(contexts, contexts, "o-", color="tab:orange", label=whole)
    below.plot(contexts, longest, "s-", color="tab:blue", label=split)
    below.set_ylabel(text("tokens that\neach walks", "每个程序\n处理的词元"))
    below.set_xlabel(text("context length, in tokens (1 sequence, 8 KV heads)", "上下文长度（1 个序列，8 个 KV 头）"))
    for axes in (above, below):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(contexts, [f"{c // 1024}K" if c >= 1024 else str(c) for c in contexts])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value / 1024:g}K" if value >= 1024 else f"{value:g}")
    below.legend(frameon=False)
    return figure
