"""The pictures of chapter 3: a pool filled in two ways, waste against block size, and a fork."""

import math
import random
from collections.abc import Callable

import matplotlib.pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mini_infer.memory import BlockManager
from mini_infer.scheduler import Scheduler, Sequence
from tutorials import harness

Text = Callable[[str, str], str]

FREE, EMPTY, OTHERS, OTHERS_TOO, ONE = range(5)
COLOURS = ["white", "#d9d9d9", "tab:blue", "#8ab8dc", "tab:orange"]
ROWS, ROW = 4, 1024  # 4096 slots


def traffic(max_num_seqs: int, num_steps: int) -> Scheduler:
    """A scheduler over 256 blocks of 16, some steps into a heavy-tailed load."""
    draw = random.Random(0)
    scheduler = Scheduler(max_num_seqs, ROW, 16, block_manager=BlockManager(16, ROWS * ROW // 16))
    for name in range(400):
        num_prompt, num_output = (min(500, max(4, round(draw.lognormvariate(math.log(80), 1)))) for _ in range(2))
        scheduler.add(Sequence(str(name), [0] * num_prompt, num_prompt, num_prompt + num_output))
    for _ in range(num_steps):
        harness.step(scheduler)
    return scheduler


def draw_pool(text: Text) -> Figure:
    """The same memory at the same step: a reservation for each of four sequences, or blocks for as many as fit."""
    reserved = [EMPTY] * (ROWS * ROW)
    few = traffic(ROWS, 400).running
    for row, sequence in enumerate(few):
        start, colour = row * ROW, (ONE, OTHERS, OTHERS_TOO, OTHERS)[row]
        reserved[start : start + len(sequence)] = [colour] * len(sequence)

    paged = [FREE] * (ROWS * ROW)
    many = traffic(256, 400).running
    one = max(many, key=lambda sequence: len(sequence.block_table))
    for place, sequence in enumerate(many):
        colour = ONE if sequence is one else (OTHERS, OTHERS_TOO)[place % 2]
        for number, block in enumerate(sequence.block_table):
            for offset in range(16):
                is_filled = number * 16 + offset < len(sequence)
                paged[block * 16 + offset] = colour if is_filled else EMPTY

    figure, axes = plt.subplots(2, 1, figsize=(7, 4.6))
    titles = (
        text(f"Reserved: {len(few)} sequences run", f"按上限预留：{len(few)} 个序列在运行"),
        text(f"Paged: {len(many)} sequences run", f"分页：{len(many)} 个序列在运行"),
    )
    for ax, slots, title in zip(axes, (reserved, paged), titles, strict=True):
        picture = [slots[row * ROW : (row + 1) * ROW] for row in range(ROWS)]
        ax.imshow(picture, ListedColormap(COLOURS), vmin=0, vmax=4, aspect="auto", interpolation="nearest")
        ax.set_title(title, loc="left")
        ax.set_yticks([row - 0.5 for row in range(1, ROWS)], [])
        ax.grid(axis="y", color="black", linewidth=1)
        ax.set_xticks([])
        ax.tick_params(length=0)
        for spine in ax.spines.values():
            spine.set_visible(True)
    figure.legend(
        handles=[
            Patch(color=COLOURS[ONE], label=text("one sequence", "某一个序列")),
            Patch(color=COLOURS[OTHERS], label=text("other sequences", "其他序列")),
            Patch(color=COLOURS[EMPTY], label=text("taken, but empty", "占着却没写")),
            Patch(facecolor="white", edgecolor="black", label=text("free", "空闲")),
        ],
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    return figure


def draw_waste(text: Text) -> Figure:
    """Slots taken and not filled, as a share of those taken, against the block size."""
    draw = random.Random(0)
    lengths = [min(ROW, round(draw.lognormvariate(5, 1))) for _ in range(1000)]
    sizes = [2**power for power in range(11)]
    shares = []
    for block_size in sizes:
        manager = BlockManager(block_size, num_gpu_blocks=1)
        taken = sum(manager.blocks_for(length) for length in lengths) * block_size
        shares.append(100 * (1 - sum(lengths) / taken))
    mean = sum(lengths) / len(lengths)
    model = [100 * (size - 1) / 2 / (mean + (size - 1) / 2) for size in sizes]

    figure, ax = plt.subplots()
    ax.plot(sizes, shares, "o-", color="tab:blue", label=text("1,000 drawn lengths", "抽取的 1000 个长度"))
    ax.plot(sizes, model, "--", color="tab:orange", label=text("half a block each", "每个序列浪费半块"))
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.set_xlabel(text("block size (tokens)", "块大小（词元）"))
    ax.set_ylabel(text("taken, but empty (%)", "占着却没写的比例（%）"))
    ax.annotate(
        text("one block holds\nthe longest sequence:\na reservation", "一个块装得下\n最长的序列：\n就是按上限预留"),
        (1024, shares[-1]),
        (20, 45),
        arrowprops={"arrowstyle": "->"},
    )
    ax.legend(frameon=False, loc="upper left")
    return figure


def draw_fork(text: Text) -> Figure:
    """Block tables of three sequences forked from a prompt, before and after each has written its first own token."""
    scheduler = Scheduler(8, 64, 16)
    children = tuple(Sequence("", [0] * 26, 26, 64) for _ in range(2))
    parent = Sequence("", [0] * 26, 26, 64, forks=children, num_seats=3)
    family = [parent, *children]
    scheduler.add(parent)
    harness.step(scheduler)
    before = [list(sequence.block_table) for sequence in family]
    scheduler.schedule()
    after = [list(sequence.block_table) for sequence in family]

    figure, axes = plt.subplots(1, 2, figsize=(7, 3.2), sharey=True)
    titles = (text("forked", "刚分叉"), text("each writes a token", "各写一个词元之后"))
    for ax, tables, title in zip(axes, (before, after), titles, strict=True):
        num_blocks = len({block for table in tables for block in table})
        for row, table in enumerate(tables):
            for place, block in enumerate(table):
                is_shared = sum(block in other for other in tables) > 1
                colour = "tab:orange" if is_shared else "#8ab8dc"
                ax.add_patch(plt.Rectangle((place, row), 0.92, 0.8, facecolor=colour, edgecolor="black"))
                label = text(f"block {block}", f"块 {block}")
                ax.text(place + 0.46, row + 0.4, label, ha="center", va="center")
        ax.set_title(text(f"{title}: {num_blocks} blocks", f"{title}：{num_blocks} 个块"))
        ax.set_xlim(-0.1, 2.1)
        ax.set_ylim(3, -0.2)
        ax.set_xticks([0.46, 1.46], [text("tokens 0–15", "词元 0–15"), text("tokens 16–31", "词元 16–31")])
        ax.set_yticks([0.4, 1.4, 2.4], [text(f"answer {n}", f"回答 {n}") for n in (1, 2, 3)])
        ax.tick_params(length=0)
        for spine in ax.spines.values():
            spine.set_visible(False)
    figure.legend(
        handles=[
            Patch(facecolor="tab:orange", edgecolor="black", label=text("shared", "共享")),
            Patch(facecolor="#8ab8dc", edgecolor="black", label=text("its own", "独占")),
        ],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    return figure


def draw(text: Text) -> dict[str, Figure]:
    return {"pool": draw_pool(text), "waste": draw_waste(text), "fork": draw_fork(text)}
