"""Which backend runs each operation on a CPU: asked of the registry, without and with a name."""

from collections.abc import Callable

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from mini_infer import kernels

BACKENDS = ("reference", "cpu", "mine")
CHOSEN, ABLE = "tab:blue", "#cfe2f3"
OPERATIONS = [op for op in kernels.OPS if op != "attention"]  # which is made of others where a backend has no own
Text = Callable[[str, str], str]


def choice(text: Text) -> Figure:
    for op in ("add_rmsnorm", "silu_and_mul"):
        kernels.register(op, backend="mine", devices=("cpu",))(lambda *arguments: None)

    figure, panels = plt.subplots(1, 2, figsize=(7, 4.2), sharey=True)
    titles = text("no backend named", "没有指定后端"), text('"mine" named', "指定了 mine")
    for axes, wanted, title in zip(panels, (None, "mine"), titles, strict=True):
        with kernels.use_backend(wanted):
            for row, op in enumerate(OPERATIONS):
                for column, backend in enumerate(BACKENDS):
                    if backend in kernels.available_backends(op, "cpu"):
                        colour = CHOSEN if backend == kernels.backend_of(op, "cpu") else ABLE
                        axes.add_patch(Rectangle((column - 0.46, row - 0.42), 0.92, 0.84, color=colour))
        axes.set(xlim=(-0.6, 2.6), ylim=(len(OPERATIONS) - 0.4, -0.6), title=title)
        axes.set_xticks(range(len(BACKENDS)), BACKENDS)
        axes.set_yticks(range(len(OPERATIONS)), OPERATIONS, family="monospace", fontsize=9)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.legend(
        handles=[Patch(color=CHOSEN, label=text("runs", "选用")), Patch(color=ABLE, label=text("could run", "可用"))],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    return figure


def draw(text: Text) -> dict[str, Figure]:
    return {"choice": choice(text)}
