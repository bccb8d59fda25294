"""The picture of chapter 2: operations of the engine on the roofline of the machine that they were timed on."""

import json
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "kernels-cpu.json"
ITEMSIZE = 2  # bfloat16
INPUTS, OUTPUTS = 1024, 6144  # of the linear layer that was timed
HEADS, KV_HEADS, HEAD_DIM = 16, 8, 128


def draw(text: Callable[[str, str], str]) -> dict[str, Figure]:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    bandwidth = results["figures"]["copy_bandwidth_gb_per_s"]
    peak = results["figures"]["matrix_tflops"]["bfloat16"] * 1e3
    seconds = {
        (row["op"], row["shape"]): row["microseconds"] / 1e6
        for row in results["figures"]["kernels"]
        if (row["backend"], row["dtype"]) == ("cpu", "bfloat16")
    }

    figure, axes = plt.subplots()
    axes.loglog([0.5, peak / bandwidth, 800], [0.5 * bandwidth, peak, peak], color="black", linewidth=1.5)
    axes.axvspan(0.5, peak / bandwidth, color="tab:blue", alpha=0.07, linewidth=0)
    axes.axvspan(peak / bandwidth, 800, color="tab:orange", alpha=0.07, linewidth=0)
    axes.text(0.6, 11, text("bound by memory", "访存受限"), color="tab:blue")
    axes.text(700, 11, text("bound by arithmetic", "计算受限"), color="tab:orange", ha="right")
    axes.text(1.1, 1.35 * bandwidth, f"{bandwidth} GB/s", rotation=33, rotation_mode="anchor", fontsize=9)
    axes.text(25, peak * 1.06, f"{peak:.0f} GFLOP/s", fontsize=9)

    def point(op: str, shape: str, flops: int, num_bytes: int, label: str, above: bool = False) -> None:
        speed = flops / seconds[op, f"Qwen3-0.6B, {shape}"] / 1e9
        linear = op == "pack_linear"
        marker, colour = ("o", "tab:blue") if linear else ("s", "tab:orange")
        axes.plot(flops / num_bytes, speed, marker=marker, color=colour, markersize=8)
        axes.annotate(
            label,
            (flops / num_bytes, speed),
            xytext=(-4, 8 if above else -8) if linear else (9, 0),
            textcoords="offset points",
            va="center" if not linear else "bottom" if above else "top",
            fontsize=9,
        )

    for tokens in (1, 16, 256):
        num_bytes = ITEMSIZE * (INPUTS * OUTPUTS + tokens * (INPUTS + OUTPUTS))
        label = text(f"linear layer,\n{tokens} token{'s' if tokens > 1 else ''}", f"线性层，\n{tokens} 个词元")
        shape = f"{tokens} tokens x {INPUTS} to {OUTPUTS}"
        point("pack_linear", shape, 2 * tokens * INPUTS * OUTPUTS, num_bytes, label, above=tokens == 256)
    sequences, context, new = 8, 512, 256
    point(
        "paged_attention",
        f"{sequences} x {context} tokens",
        4 * sequences * context * HEADS * HEAD_DIM,
        ITEMSIZE * 2 * sequences * HEAD_DIM * (context * KV_HEADS + HEADS),
        text("attention,\ndecode", "注意力，\n解码"),
    )
    pairs = sum(range(context - new + 1, context + 1))
    point(
        "paged_prefill_attention",
        f"{new} of {context} tokens new",
        4 * HEADS * HEAD_DIM * pairs,
        ITEMSIZE * 2 * HEAD_DIM * (context * KV_HEADS + new * HEADS),
        text("attention,\nprefill", "注意力，\n预填充"),
    )
    axes.set(xlim=(0.5, 800), ylim=(10, 900))
    axes.set_xlabel(text("arithmetic intensity (FLOP/byte)", "算术强度（FLOP/字节）"))
    axes.set_ylabel("GFLOP/s")
    where = f"{results['hardware']['cpu']}, {results['date']}"
    axes.set_title(
        text(f"Qwen3-0.6B, bfloat16, measured on {where}", f"Qwen3-0.6B，bfloat16，实测于 {where}"), fontsize=10
    )
    return {"roofline": figure}
