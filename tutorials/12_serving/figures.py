"""The picture of chapter 12: what each of many clients feels, and what all of them get."""

import json
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

MEASURED = Path(__file__).with_name("load.json")


def draw(text: Callable[[str, str], str]) -> dict[str, Figure]:
    return {"load": load(text)}


def load(text: Callable[[str, str], str]) -> Figure:
    """Latencies above, throughput below, against the number of clients."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    figures = measured["figures"]
    rows, seats = figures["rows"], figures["seats"]
    clients = [row["clients"] for row in rows]

    figure, (upper, lower) = plt.subplots(2, sharex=True, figsize=(7, 5))
    upper.plot(
        clients,
        [row["ttft_ms"] for row in rows],
        marker="o",
        color="tab:orange",
        label=text("time to first token", "首词元时间"),
    )
    upper.plot(
        clients,
        [row["itl_ms"] for row in rows],
        marker="s",
        color="tab:blue",
        label=text("inter-token latency", "词元间延迟"),
    )
    upper.set_yscale("log")
    upper.yaxis.set_major_formatter("{x:g}")
    upper.set_ylabel(text("milliseconds, mean", "毫秒，平均"))
    upper.legend(frameon=False)
    lower.plot(clients, [row["tokens_per_second"] for row in rows], marker="o", color="tab:green")
    lower.set_ylabel(text("tokens per second, all", "每秒词元数，合计"))
    lower.set_ylim(bottom=0)
    for axes in (upper, lower):
        axes.axvline(seats, color="grey", linestyle="--", linewidth=1)
    lower.annotate(
        text(f"{seats} seats", f"{seats} 个座位"),
        (seats, 0),
        xytext=(6, 8),
        textcoords="offset points",
        color="dimgrey",
    )
    about = text(
        "clients at once, {} tokens in and {} out; one thread of {}",
        "同时在线的客户端数，输入 {} 个词元，输出 {} 个；{} 的一个线程",
    )
    lower.set_xlabel(about.format(figures["input_tokens"], figures["output_tokens"], measured["hardware"]["cpu"]))
    return figure
