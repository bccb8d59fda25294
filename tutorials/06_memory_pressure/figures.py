"""The pictures of chapter 6, drawn from the plans of the scheduler; no model runs."""

from collections.abc import Callable

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from mini_infer.memory import BlockManager
from mini_infer.scheduler import Scheduler, Sequence
from tutorials import harness

PROMPTS = {"A": 14, "B": 16, "C": 14, "D": 14, "E": 13, "F": 14}
"""The requests of the page, and how many tokens each question has with its chat template."""

COLOURS = {"A": "#1f77b4", "B": "#8fbcdf", "C": "#7f7f7f", "D": "#c7c7c7", "E": "#ffbf86", "F": "#ff7f0e"}


def draw(text: Callable[[str, str], str]) -> dict[str, Figure]:
    """Both pictures."""
    return {"pressure": pressure(text), "chunks": chunks(text)}


def pressure(text: Callable[[str, str], str]) -> Figure:
    """Blocks held by each of six sequences over the steps, in a pool too small for them."""
    num_blocks, block_size, num_generated = 16, 16, 48
    scheduler = Scheduler(256, 256, block_size, block_manager=BlockManager(block_size, num_blocks))
    for name, length in PROMPTS.items():
        scheduler.add(Sequence(name, [1] * length, length, length + num_generated))
    held: dict[str, list[int]] = {name: [] for name in PROMPTS}
    preempted: list[tuple[int, str]] = []
    while not scheduler.is_finished():
        plan = scheduler.schedule()
        running = {sequence.request_id: len(sequence.block_table) for sequence in scheduler.running}
        preempted += [(len(held["A"]) + 1, sequence.request_id) for sequence in plan.preempted]
        for name, counts in held.items():
            counts.append(running.get(name, 0))
        scheduler.commit(harness.outcomes(plan))

    figure, axes = plt.subplots(figsize=(7, 3.8))
    steps = range(1, len(held["A"]) + 1)
    axes.stackplot(steps, *held.values(), step="mid", labels=list(PROMPTS), colors=list(COLOURS.values()))
    axes.axhline(num_blocks, color="black", lw=1, ls="--")
    axes.text(len(steps), num_blocks + 0.3, text("the pool", "内存池"), ha="right", va="bottom")
    for step, name in preempted:
        axes.annotate(
            text("{} preempted", "{} 被抢占").format(name),
            (step, num_blocks),
            xytext=(step - 3, num_blocks + 2.6),
            ha="center",
            arrowprops={"arrowstyle": "->"},
        )
    axes.set_xlim(0.5, len(steps) + 0.5)
    axes.set_ylim(0, num_blocks + 4)
    axes.set_yticks(range(0, num_blocks + 1, 4))
    axes.set_xlabel(text("step", "步"))
    axes.set_title(text("Blocks in use, by sequence", "各序列占用的块"))
    figure.legend(loc="outside lower center", ncols=len(PROMPTS), frameon=False)
    return figure


def chunks(text: Callable[[str, str], str]) -> Figure:
    """Tokens of each step while sixteen sequences decode and a prompt of 800 tokens arrives, for two token budgets."""
    figure, panels = plt.subplots(1, 2, figsize=(7, 3.6), sharey=True, gridspec_kw={"width_ratios": [1, 2]})
    for axes, budget in zip(panels, (1024, 128), strict=True):
        scheduler = Scheduler(256, 1024, 16, max_num_batched_tokens=budget)
        for place in range(16):
            scheduler.add(Sequence(str(place), [1] * 5, 5, 1000))
        decodes, prompt = [], []
        while len(decodes) < (6 if budget == 1024 else 12):
            if len(decodes) == 3:
                scheduler.add(Sequence("long", [1] * 800, 800, 900))
            counts = harness.computed(harness.step(scheduler)).values()
            decodes.append(sum(n == 1 for n in counts))
            prompt.append(sum(n for n in counts if n > 1))
        steps = range(len(decodes) - 1)  # without the first, which computed the short prompts
        axes.bar(steps, prompt[1:], color="#ffbf86", label=text("the long prompt", "长提示词"))
        axes.bar(steps, decodes[1:], bottom=prompt[1:], color="#1f77b4", label=text("decodes", "解码"))
        axes.set_title(text("budget {}", "预算 {}").format(budget))
        axes.set_xlabel(text("step", "步"))
        axes.set_xticks([])
    panels[0].set_ylabel(text("tokens in the step", "这一步的词元数"))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure
