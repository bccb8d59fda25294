"""The pictures of chapter 11: host and device in time, from measured phases; and launches, from sizes."""

import json
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

MEASURED = Path(__file__).with_name("phases.json")
FASTER = 10  # than the CPU that was measured, so that it looks like a device of its own
STEPS = 4
PLAN, DEVICE, READ = "tab:blue", "tab:orange", "#8fbcdf"

LAUNCH = 5.0  # microseconds, from Python
SHORTEST = 2.0  # microseconds, of a kernel
BYTES_PER_MICROSECOND = 3e6
HIDDEN, QUERIES, KEYS, FEED_FORWARD = 1024, 2048, 1024, 3072  # sizes of Qwen3-0.6B
WEIGHTS = {  # of one layer, by the kernel that reads them
    "add_rmsnorm": 0,
    "qkv": HIDDEN * (QUERIES + 2 * KEYS),
    "qk_norm_rope": 0,
    "write_kv": 0,
    "attention": 0,
    "out": QUERIES * HIDDEN,
    "add_rmsnorm ": 0,
    "gate, up": 2 * HIDDEN * FEED_FORWARD,
    "silu_and_mul": 0,
    "down": FEED_FORWARD * HIDDEN,
}

Text = Callable[[str, str], str]
Bar = tuple[float, float, str]
"""Start, length, colour."""


def draw(text: Text) -> dict[str, Figure]:
    return {"timeline": timeline(text), "launches": launches(text)}


def timeline(text: Text) -> Figure:
    """Four steps, in turns and overlapped."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    plan, device, read = (measured["figures"][name] for name in ("plan_ms", "device_ms", "read_ms"))
    device /= FASTER

    turns: tuple[list[Bar], list[Bar]] = [], []
    now = 0.0
    for _ in range(STEPS):
        turns[0].append((now, plan, PLAN))
        turns[1].append((now + plan, device, DEVICE))
        turns[0].append((now + plan + device, read, READ))
        now += plan + device + read

    together: tuple[list[Bar], list[Bar]] = [(0.0, plan, PLAN)], [(plan, device, DEVICE)]
    host, end = plan, plan + device  # when the host is free, and when the step under way ends
    for _ in range(STEPS - 1):
        together[0].append((host, plan, PLAN))
        begin = max(end, host + plan)
        together[1].append((begin, device, DEVICE))
        host = max(end, host + plan)
        together[0].append((host, read, READ))
        host, end = host + read, begin + device
    together[0].append((max(end, host), read, READ))

    figure, (upper, lower) = plt.subplots(2, sharex=True, figsize=(7, 3.8))
    rows(upper, turns, text("in turns", "轮流"), text)
    rows(lower, together, text("overlapped", "重叠"), text)
    about = text(
        "milliseconds; {} sequences on {}, the device's time divided by {}",
        "毫秒；{} 个序列，测自 {}，设备的时间除以 {}",
    )
    lower.set_xlabel(about.format(measured["figures"]["sequences"], measured["hardware"]["cpu"], FASTER), fontsize=9)
    figure.legend(
        handles=[
            plt.Rectangle((0, 0), 1, 1, color=colour, label=label)
            for colour, label in (
                (PLAN, text("plan", "规划")),
                (DEVICE, text("forward pass and sampling", "前向计算与采样")),
                (READ, text("read", "读取")),
            )
        ],
        loc="outside upper center",
        ncols=3,
        frameon=False,
    )
    return figure


def rows(axes: Axes, bars: tuple[list[Bar], list[Bar]], title: str, text: Text) -> None:
    """Host above, device below."""
    for row, row_bars in enumerate(bars):
        for start, length, colour in row_bars:
            axes.broken_barh([(start, length)], (row - 0.36, 0.72), color=colour, edgecolor="white", linewidth=0.8)
    axes.set_yticks([0, 1], [text("host", "主机"), text("device", "设备")])
    axes.set_ylim(1.6, -0.6)
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)
    axes.set_title(title, loc="left", fontsize=11)


def launches(text: Text) -> Figure:
    """One layer, with a launch for each kernel and as part of a graph."""
    lengths = {name: max(SHORTEST, 2 * size / BYTES_PER_MICROSECOND) for name, size in WEIGHTS.items()}
    eager: tuple[list[Bar], list[Bar]] = [], []
    end = 0.0
    for place, length in enumerate(lengths.values()):
        eager[0].append((place * LAUNCH, LAUNCH, PLAN))
        begin = max(end, (place + 1) * LAUNCH)
        eager[1].append((begin, length, DEVICE))
        end = begin + length
    graph: tuple[list[Bar], list[Bar]] = [(0.0, LAUNCH, PLAN)], []
    end = LAUNCH
    for length in lengths.values():
        graph[1].append((end, length, DEVICE))
        end += length

    figure, (upper, lower) = plt.subplots(2, sharex=True, figsize=(7, 3.8))
    rows(upper, eager, text("a launch for each kernel", "逐个启动算子"), text)
    rows(lower, graph, text("one launch for the graph", "一次启动整张图"), text)
    lower.set_xlabel(text("microseconds, one layer; computed, not measured", "微秒，一层；由计算得出，并非实测"))
    figure.legend(
        handles=[
            plt.Rectangle((0, 0), 1, 1, color=PLAN, label=text("launch", "启动")),
            plt.Rectangle((0, 0), 1, 1, color=DEVICE, label=text("kernel", "算子")),
        ],
        loc="outside upper center",
        ncols=2,
        frameon=False,
    )
    return figure
