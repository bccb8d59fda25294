"""The picture of chapter 13: what rounding does to a row of weights, with one scale and with several."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from safetensors import safe_open

from mini_infer.config import BUNDLED_MODEL
from mini_infer.models.quantization.schemes import int4, int8

NAME = "model.layers.0.mlp.down_proj.weight"


def draw(text: Callable[[str, str], str]) -> dict[str, Figure]:
    return {"error": error(text)}


def error(text: Callable[[str, str], str]) -> Figure:
    """Root mean square error of a matrix of the bundled model, against bits per weight."""
    with safe_open(Path(BUNDLED_MODEL) / "model.safetensors", "pt") as reader:
        weight = reader.get_tensor(NAME).float()
    size = weight.square().mean().sqrt()

    def off(values: torch.Tensor) -> float:
        return float((values - weight).square().mean().sqrt() / size)

    groups = [16, 32, 64, 128]
    four = [(4 + 16 / group, off(int4(weight, group).dequantize())) for group in groups]
    whole = replace(int4(weight, weight.shape[1]))
    eight = int8(weight)

    figure, axes = plt.subplots(figsize=(7, 3.6))
    axes.plot(*zip(*four, strict=True), marker="o", color="tab:blue")
    for (bits, value), group in zip(four, groups, strict=True):
        axes.annotate(
            text(f"groups of {group}", f"每组 {group} 个"),
            (bits, value),
            (6, 4),
            textcoords="offset points",
            fontsize=9,
        )
    points = [
        (
            4 + 16 / weight.shape[1],
            off(whole.dequantize()),
            text("int4, one scale for a row", "int4，每行一个缩放系数"),
        ),
        (
            8 + 32 / weight.shape[1],
            off(eight.dequantize()),
            text("int8, one scale for a row", "int8，每行一个缩放系数"),
        ),
        (16, off(weight.bfloat16().float()), "bfloat16"),
    ]
    for bits, value, label in points:
        axes.plot(bits, value, marker="s", color="tab:orange")
        side = (-6, "right") if bits > 12 else (8, "left")
        axes.annotate(label, (bits, value), (side[0], 6), textcoords="offset points", ha=side[1], fontsize=9)
    axes.set_yscale("log")
    axes.set_xlabel(text("bits per weight", "每个权重的位数"))
    axes.set_ylabel(text("error, relative to the weights", "误差（相对于权重）"))
    return figure
