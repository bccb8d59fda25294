"""What `compare` found, as tables and as a plot."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def show(model: str, workload: dict[str, Any], console: Console) -> None:
    """One workload: a line per engine."""
    table = Table(
        title=f"{model}, {workload['name']}: {workload['input_tokens']} tokens in, {workload['output_tokens']} out",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
    )
    table.add_column("engine", no_wrap=True)
    for column in ("tok/s", "ours is", "limit", "TTFT mean", "p50", "ITL", "memory", "loaded", "1st token"):
        table.add_column(column, justify="right", no_wrap=True)
    for label, row in workload["engines"].items():
        peak = row["peak_memory_mb"]
        table.add_row(
            label,
            f"{row['tokens_per_second']:,.1f}",
            f"{row['mini_infer_is_times_as_fast']:.2f}x",
            f"{row['share_of_the_machine']:.0%}",
            f"{row['ttft_mean_seconds']:.3f} s",
            f"{row['ttft_p50_seconds']:.3f} s",
            f"{row['itl_seconds'] * 1e3:.1f} ms",
            "?" if peak is None else f"{peak:,} MB",
            f"{row['ready_seconds']:.1f} s",
            f"{row['first_token_seconds']:.1f} s",
        )
    machine = workload["machine"]
    console.print(table)
    console.print(
        f"  limit: {machine['floor_tokens_per_second']:,.1f} tok/s; this machine reads {machine['read_gb_per_second']} "
        f"GB/s and multiplies {machine['matrix_tflops']} TFLOP/s, and {machine['limit']} is what binds",
        highlight=False,
        soft_wrap=True,
    )
    for label, row in workload["engines"].items():
        if "agreement" in row:
            prose = _prose(row["agreement"], workload["requests"])
            console.print(f"  {label}: {prose}", highlight=False, soft_wrap=True)


def _prose(agreement: dict[str, Any], num_requests: int) -> str:
    verdict = {True: "agrees with transformers: ", False: "DOES NOT agree with transformers: ", None: ""}
    text = (
        f"{verdict[agreement['agrees']]}{agreement['identical_requests']} of {num_requests} requests identical to "
        f"transformers', {agreement['share_of_tokens_before_the_first_difference']:.0%} of the tokens before a first "
        "difference"
    )
    gap = agreement["largest_logit_gap_at_a_first_difference"]
    return text if gap is None else f"{text}; where they part, its two best logits are at most {gap:.2g} apart"


def show_rest(model: str, found: dict[str, Any], console: Console) -> None:
    """Memory and start-up, where they were measured."""
    for name in ("memory", "startup"):
        if name in found:
            table = Table("figure", "value", title=f"{model}, {name}", title_justify="left", box=box.SIMPLE_HEAD)
            for figure, value in found[name].items():
                table.add_row(figure.replace("_", " "), str(value))
            console.print(table)


def plot(figures: dict[str, Any], path: Path) -> Path:
    """One panel per workload, one bar per engine: generated tokens per second. Returns the path."""
    import matplotlib

    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot

    panels = [(model, row) for model, found in figures["models"].items() for row in found["workloads"]]
    labels = list(dict.fromkeys(label for _, row in panels for label in row["engines"]))
    colours = dict(zip(labels, pyplot.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    counts = [len(row["engines"]) for _, row in panels]
    figure, axes = pyplot.subplots(
        len(panels),
        figsize=(9, 0.7 * len(panels) + 0.3 * sum(counts)),
        height_ratios=counts,
        squeeze=False,
        layout="constrained",
    )
    for (model, row), axis in zip(panels, axes[:, 0], strict=True):
        engines = row["engines"]
        speeds = [engine["tokens_per_second"] for engine in engines.values()]
        limit = row["machine"]["floor_tokens_per_second"]
        axis.axvline(limit, color="grey", linestyle="--", linewidth=1)
        bars = axis.barh(list(engines), speeds, color=[colours[label] for label in engines])
        axis.bar_label(bars, [f" {speed:,.1f}" for speed in speeds], fontsize=8)
        axis.set_title(
            f"{model}: {row['name']}, {row['input_tokens']} tokens in, {row['output_tokens']} out",
            loc="left",
            fontsize=9,
        )
        axis.tick_params(labelsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.15 * max(*speeds, limit))
    axes[-1, 0].set_xlabel(
        f"generated tokens per second, {figures['dtype']}, median of {figures['rounds']} rounds; dashed: what this "
        "machine could do",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
