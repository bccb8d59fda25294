"""The pictures of chapter 11, from measurements: host and device in time; and steps, eager and replayed."""

import json
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PHASES, REPLAYS = (Path(__file__).with_name(name) for name in ("phases.json", "replays.json"))
FASTER = 3  # than the CPU that was measured, so that it looks like a device of its own
STEPS = 4
PLAN, DEVICE, READ = "tab:blue", "tab:orange", "#8fbcdf"

Text = Callable[[str, str], str]
Bar = tuple[float, float, str]
"""Start, length, colour."""


def draw(text: Text) -> dict[str, Figure]:
    return {"timeline": timeline(text), "replays": replays(text)}


def timeline(text: Text) -> Figure:
    """Four steps, in turns and overlapped."""
    measured = json.loads(PHASES.read_text(encoding="utf-8"))
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


def replays(text: Text) -> Figure:
    """A decode step's time by the number of sequences: what a replay takes, and what the calls from Python add."""
    measured = json.loads(REPLAYS.read_text(encoding="utf-8"))
    sequences, eager, replayed = (measured["figures"][name] for name in ("sequences", "eager_ms", "replayed_ms"))
    calls = [slow - fast for slow, fast in zip(eager, replayed, strict=True)]
    ratios = [f"{slow / fast:.1f}x" for slow, fast in zip(eager, replayed, strict=True)]

    figure, axes = plt.subplots(figsize=(7, 3.8))
    places = range(len(sequences))
    axes.bar(places, replayed, 0.7, color=DEVICE, label=text("replayed", "重放"))
    bars = axes.bar(places, calls, 0.7, replayed, color=PLAN, label=text("what eager takes more", "逐个启动多用的时间"))
    axes.bar_label(bars, ratios, padding=2)
    axes.set_xticks(places, sequences)
    axes.tick_params(axis="x", length=0)
    about = text("sequences in the step; measured on {}", "步中的序列数；测自 {}")
    axes.set_xlabel(about.format(measured["hardware"]["cpu"]))
    axes.set_ylabel(text("milliseconds for a step", "一步的毫秒数"))
    axes.legend(loc="upper left", frameon=False)
    return figure
