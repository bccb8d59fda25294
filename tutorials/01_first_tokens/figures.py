"""The pictures of chapter 1: what temperature does, and how one random number picks a token."""

from collections.abc import Callable
from functools import cache

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from mini_infer import LLM, SamplingParams
from mini_infer.random import uniforms

BLUE, ORANGE, LIGHT, GREY = "tab:blue", "tab:orange", "#a6cee3", "#dddddd"
SEED = 7


def draw(text: Callable[[str, str], str]) -> dict[str, Figure]:
    return {"temperature": temperature(text), "line": line(text)}


@cache
def model() -> LLM:
    return LLM(dtype="float32", max_num_seqs=1)


def next_token_logits(prompt: str) -> Tensor:
    """The tutor's logits after a prompt, but for a constant; float64 `[vocab_size]`."""
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=model().model_config.vocab_size)
    [places] = [output.logprobs for output in model().generate(prompt, params, use_tqdm=False)]
    row = torch.empty(len(places[0]), dtype=torch.float64)
    for token_id, entry in places[0].items():
        row[token_id] = entry.logprob
    return row


def name(token_id: int) -> str:
    """A token as it can be shown on an axis."""
    return model().detokenize([token_id]).replace("\n", "↵").strip()


def temperature(text: Callable[[str, str], str]) -> Figure:
    prompt = text("A token is the", "从前有一只聪明的")
    logits = next_token_logits(prompt)
    ids = logits.topk(7).indices
    figure, axes = plt.subplots()
    for place, (value, colour) in enumerate(((0.5, BLUE), (1, LIGHT), (2, ORANGE))):
        probs = (logits / value).softmax(dim=-1)
        others = 1 - float(probs[ids].sum())
        heights = [*probs[ids].tolist(), others]
        bars = [column + 0.28 * (place - 1) for column in range(len(heights))]
        axes.bar(bars, heights, width=0.28, color=colour, label=f"T = {value}")
        axes.text(bars[-1], others + 0.01, f"{others:.0%}", ha="center", fontsize=9)
    others_name = text(f"the other\n{len(logits) - 7}", f"其余\n{len(logits) - 7} 个")
    axes.set_xticks(range(8), [*map(name, ids.tolist()), others_name])
    axes.tick_params(axis="x", labelsize=10)
    axes.set_ylabel(text("probability", "概率"))
    axes.set_title(text(f"What follows “{prompt}”?", f"“{prompt}”后面接什么？"))
    axes.legend(frameon=False, loc="upper center")
    return figure


def line(text: Callable[[str, str], str]) -> Figure:
    prompt, top_p = text("Once upon a time, a", "从前有一只"), 0.5
    probs = next_token_logits(prompt).softmax(dim=-1)
    ranked, order = probs.sort(descending=True)
    kept = torch.zeros(len(probs), dtype=torch.bool)
    kept[order[ranked.cumsum(dim=-1) - ranked < top_p]] = True
    after = torch.where(kept, probs, 0)
    u = float(uniforms([SEED], [0], [len(model().tokenize(prompt))])[0])
    figure, axes = plt.subplots(figsize=(7, 3.2))
    for row, widths in ((1, probs), (0, after / after.sum())):
        ends = widths.cumsum(dim=-1)
        chosen = int(torch.searchsorted(ends, u, right=True))
        for token_id in (widths > 0.02).nonzero()[:, 0].tolist():  # narrower ones would not be seen
            width, start = float(widths[token_id]), float(ends[token_id] - widths[token_id])
            colour = ORANGE if token_id == chosen else LIGHT if kept[token_id] else GREY
            axes.barh(row, width, left=start, height=0.5, color=colour, edgecolor="white")
            label = axes.text(start + width / 2, row, name(token_id), ha="center", va="center", fontsize=9)
            label.set_bbox({"facecolor": colour, "edgecolor": "none", "pad": 1})  # the dashed line passes behind it
    axes.axvline(u, color="black", linestyle="--", linewidth=1.2, zorder=2)
    axes.text(u, 1.4, f"u = {u:.3f}", ha="center", va="bottom")
    axes.set_yticks([1, 0], [text("all tokens", "全部词元"), f"top_p = {top_p}"])
    axes.set(xlim=(0, 1), ylim=(-0.4, 1.4))
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(text(f"the next token after “{prompt}”", f"“{prompt}”的下一个词元"))
    return figure
