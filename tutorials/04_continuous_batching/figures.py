"""The pictures of chapter 4: who sits where in every step, and what the steps' budgets are spent on."""

from collections.abc import Callable

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from mini_infer.scheduler import Scheduler, Sequence
from tutorials import harness

Text = Callable[[str, str], str]

REQUESTS = {"A": (5, 3), "B": (3, 12), "C": (4, 2), "D": (6, 5), "E": (3, 9), "F": (5, 2), "G": (4, 4), "H": (3, 3)}
SEATS = 4
PROMPT, DECODE, IDLE = "tab:orange", "tab:blue", "#e6e6e6"


def sequence(name: str, num_prompt: int, num_output: int) -> Sequence:
    return Sequence(name, [0] * num_prompt, num_prompt, num_prompt + num_output)


def run(scheduler: Scheduler) -> list[dict[str, tuple[int, bool]]]:
    """Each step until all have ended: by name, how many tokens were computed, and whether of the prompt."""
    steps = []
    while not scheduler.is_finished():
        plan = harness.step(scheduler)
        steps.append({item.sequence.request_id: (item.num_tokens, not item.is_decode) for item in plan.scheduled})
    return steps


def load(requests: dict[str, tuple[int, int]]) -> Scheduler:
    scheduler = Scheduler(SEATS, 64, 16)
    for name, lengths in requests.items():
        scheduler.add(sequence(name, *lengths))
    return scheduler


def draw_gantt(text: Text) -> Figure:
    """Seats against steps, in static batches and in continuous ones."""
    items = list(REQUESTS.items())
    batches = [dict(items[first : first + SEATS]) for first in range(0, len(items), SEATS)]
    static = [step for batch in batches for step in run(load(batch))]
    continuous = run(load(REQUESTS))

    figure, axes = plt.subplots(2, 1, figsize=(7, 4.6), sharex=True)
    titles = text("Static batches", "静态批处理"), text("Continuous batching", "连续批处理")
    for ax, steps, title in zip(axes, (static, continuous), titles, strict=True):
        seats: list[str | None] = [None] * SEATS
        for number, step in enumerate(steps):
            seats = [name if name in step else None for name in seats]
            for name in step:
                if name not in seats:
                    seats[seats.index(None)] = name
                    ax.text(number + 0.5, seats.index(name) + 0.5, name, ha="center", va="center", color="white")
            for seat, name in enumerate(seats):
                colour = IDLE if name is None else PROMPT if step[name][1] else DECODE
                ax.add_patch(plt.Rectangle((number, seat), 0.94, 0.9, facecolor=colour, zorder=0))
        ax.set_title(text(f"{title}: {len(steps)} steps", f"{title}：{len(steps)} 步"), loc="left")
        ax.set_xlim(0, len(static))
        ax.set_ylim(SEATS, 0)
        ax.set_yticks([seat + 0.5 for seat in range(SEATS)], [str(seat + 1) for seat in range(SEATS)])
        ax.set_xticks([number + 0.5 for number in range(0, len(static), 4)], range(1, len(static) + 1, 4))
        ax.set_ylabel(text("seat", "座位"))
        ax.tick_params(length=0)
        for spine in ax.spines.values():
            spine.set_visible(False)
    axes[-1].set_xlabel(text("step", "步"))
    figure.legend(
        handles=[
            Patch(color=PROMPT, label=text("prompt", "提示词")),
            Patch(color=DECODE, label=text("decode", "解码")),
            Patch(color=IDLE, label=text("empty", "空着")),
        ],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    return figure


def draw_budget(text: Text) -> Figure:
    """Tokens of each step when a long prompt arrives among three that decode, with a large and a small budget."""
    figure, axes = plt.subplots(1, 2, figsize=(7, 3.6), sharey=True)
    for ax, budget in zip(axes, (2048, 16), strict=True):
        scheduler = Scheduler(SEATS, 128, 16, max_num_batched_tokens=budget)
        for name in "ABC":
            scheduler.add(sequence(name, 4, 12))
        decodes, prompts = [], []
        for number in range(12):
            if number == 3:
                scheduler.add(sequence("D", 70, 8))
            plan = harness.step(scheduler)
            decodes.append(sum(item.num_tokens for item in plan.scheduled if item.is_decode))
            prompts.append(plan.num_tokens - decodes[-1])
        numbers = range(1, len(decodes) + 1)
        ax.bar(numbers, decodes, color=DECODE, label=text("decodes", "解码"))
        ax.bar(
            numbers,
            prompts,
            bottom=decodes,
            color=PROMPT,
            hatch="//",
            edgecolor="white",
            label=text("prompts", "提示词"),
        )
        ax.set_title(text(f"budget {budget}", f"预算 {budget}"))
        ax.set_xlabel(text("step", "步"))
        ax.set_xticks(range(1, len(decodes) + 1, 2))
    axes[0].set_ylabel(text("tokens computed", "计算的词元数"))
    axes[1].legend(frameon=False)
    return figure


def draw(text: Text) -> dict[str, Figure]:
    return {"gantt": draw_gantt(text), "budget": draw_budget(text)}
