"""``mini-infer trace``: a trace, drawn in the terminal: totals, who ran when, how canvases filled in, and who held
which block."""

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from rich.cells import cell_len, set_cell_size
from rich.columns import Columns
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mini_infer.cli.terminal import draw_canvas
from mini_infer.exceptions import MiniInferError

Event: TypeAlias = dict[str, Any]


class TraceError(MiniInferError, ValueError):
    """A file is not a trace that an engine wrote."""


class Look(NamedTuple):
    """How something is drawn, so that it can be told apart with colours and without, and what it means."""

    mark: str
    style: str
    label: str


STATES = {  # where a column stands for several steps, it shows the first of these that occurs
    "swapped": Look("S", "white on magenta", "swapped to CPU · 换出"),
    "preempted": Look("x", "white on red", "preempted, to recompute · 被抢占待重算"),
    "prompt": Look("P", "white on blue", "prompt chunk · 提示词分块"),
    "paused": Look("-", "black on yellow", "running, not in this step · 本步未轮到"),
    "decode": Look("=", "black on green", "decode · 解码"),
    "waiting": Look(".", "bright_black", "waiting · 等待"),
}
SHARED = Look("#", "bold white on bright_black", "shared · 多个序列共享")
CACHED = Look("~", "cyan", "cached · 仅缓存")
FREE = Look(".", "bright_black", "free · 空闲")

PHASES = {
    "schedule": "调度",
    "submit": "提交",
    "compute": "计算",
    "publish": "发布",
    "rewind": "回退",
}

OWNERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
"""Marks of sequences in the block map, given out in turn."""

COLOURS = ("red", "green", "yellow", "blue", "magenta", "cyan")
"""Their colours, likewise."""

MAP_ROWS = 6
"""Most rows of one block map; beyond that, a cell stands for several blocks."""

NUM_MAPS = 4

NUM_CANVASES = 4
"""Most canvases that are drawn."""

CANVAS_LINES = 16
"""Most moments of one of them."""

NAME_WIDTH = 16


# ---- reading -----------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A sequence.

    Attributes:
        name: its name.
        look: how its blocks are drawn.
        num_prompt_tokens: its prompt's length.
        states: the states it went through, and when each began.
        reason, end, num_generated_tokens: why and when it ended and how far it got, if the trace has that.
    """

    name: str
    look: Look
    num_prompt_tokens: int = 0
    states: list[tuple[float, str]] = field(default_factory=list)
    reason: str = "..."
    end: float = float("inf")
    num_generated_tokens: int | None = None

    def state_at(self, time: float) -> str | None:
        """The state it was in; None before it came and after it ended."""
        place = bisect_right(self.states, time, key=lambda state: state[0])
        return self.states[place - 1][1] if place and time < self.end else None


@dataclass
class Step:
    """A step; times are in microseconds.

    Attributes:
        start, duration: when it ran.
        planned: when it was settled who runs.
        failed: whether it was undone.
        args: what it did, in the engine's words.
        phases: how long each took.
        num_used_blocks: that sequences held while it computed.
    """

    start: float
    duration: float
    planned: float
    failed: bool
    args: Mapping[str, Any]
    phases: dict[str, float] = field(default_factory=dict)
    num_used_blocks: int = 0


@dataclass
class Instant:
    """Something that happened to a sequence."""

    time: float
    name: str
    row: Row
    args: Mapping[str, Any]


@dataclass
class Trace:
    """What a trace says.

    Attributes:
        block_size, num_blocks: the engine's.
        steps, rows, instants: what happened, in order.
        broken_off: the engine has not finished the file.
    """

    block_size: int
    num_blocks: int
    steps: list[Step]
    rows: list[Row]
    instants: list[Instant]
    broken_off: bool


def load_trace(path: Path) -> Trace:
    """Read a trace, even one that broke off.

    Raises:
        TraceError: there is no such file, or it is something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise TraceError(
            f"cannot read {str(path)!r}: {reason}; name a file that EngineConfig(trace=...) wrote"
        ) from error
    foreign = TraceError(f"{str(path)!r} is not a trace of Mini-Infer; name a file that EngineConfig(trace=...) wrote")
    whole = _parse(text)
    # An engine that was killed has left the bracket open, perhaps within an event, of which there is one to a line.
    events = whole or _parse(text + "]") or _parse(text[: text.rfind(",\n")] + "]")
    if not isinstance(events, list):
        raise foreign
    try:
        return _read(events, broken_off=whole is None)
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration) as error:
        raise foreign from error


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _read(events: list[Event], broken_off: bool) -> Trace:
    engine = next(event["args"] for event in events if event["name"] == "mini-infer")
    steps: list[Step] = []
    latest: dict[int, Step] = {}  # on each of the tracks that steps have when several are under way
    rows: dict[int, Row] = {}
    instants: list[Instant] = []
    for event in sorted(events, key=lambda event: event["ts"]):  # stable: a step comes before its first phase
        kind, name, time, args = event["ph"], event["name"], event["ts"], event.get("args", {})
        if kind == "X" and name in PHASES:
            step = latest[event["tid"]]
            step.phases[name] = event["dur"]
            if name != "schedule":
                step.planned = min(step.planned, time)
        elif kind == "X":
            step = latest[event["tid"]] = Step(time, event["dur"], time + event["dur"], name == "failed step", args)
            steps.append(step)
        elif kind == "C" and name == "blocks" and steps:
            steps[-1].num_used_blocks = max(steps[-1].num_used_blocks, args["used"])
        elif event["pid"] == 1:
            continue
        elif name == "thread_name":
            place = len(rows)
            look = Look(OWNERS[place % len(OWNERS)], f"black on {COLOURS[place % len(COLOURS)]}", args["name"])
            rows[event["tid"]] = Row(args["name"], look)
        elif kind == "B":
            row = rows[event["tid"]]
            row.states.append((time, name))
            row.num_prompt_tokens = args.get("prompt_tokens", row.num_prompt_tokens)
        elif kind == "i":
            row = rows[event["tid"]]
            instants.append(Instant(time, name, row, args))
            if name == "finish":
                row.end, row.reason, row.num_generated_tokens = time, args["reason"], args["tokens"]
    return Trace(engine["block_size"], engine["blocks"], steps, list(rows.values()), instants, broken_off)


@dataclass
class Blocks:
    """Who holds which block.

    Attributes:
        tables: block tables by sequence name.
        known: blocks whose content the prefix cache knows.
    """

    tables: dict[str, list[int]] = field(default_factory=dict)
    known: set[int] = field(default_factory=set)

    def replay(self, trace: Trace) -> Iterator[Step]:
        """Go through the steps; at each, this object says who holds what while it computes."""
        instants = iter(trace.instants)
        upcoming = next(instants, None)
        for step in trace.steps:
            while upcoming is not None and upcoming.time < step.start:
                if upcoming.name == "fork":
                    self.tables[upcoming.row.name] = upcoming.args["block_table"]
                elif upcoming.name in ("finish", "undone"):
                    self.tables.pop(upcoming.row.name, None)
                upcoming = next(instants, None)
            self._plan(step, trace.block_size)
            yield step

    def _plan(self, step: Step, block_size: int) -> None:
        for name in step.args["preempted"]:
            self.tables.pop(name, None)
        for name, table in step.args["block_tables"].items():
            before = self.tables.get(name, [])
            kept = next((i for i, (old, new) in enumerate(zip(before, table, strict=False)) if old != new), len(before))
            kept = max(kept, step.args["found_blocks"].get(name, 0))
            self.known.difference_update(table[kept:])  # given out anew, whatever they held before
            self.tables[name] = table
        if not step.failed:
            self.known.update(step.args["remembered"])

    def draw(self, num_blocks: int, looks_by_name: Mapping[str, Look]) -> list[Look]:
        """How each block is drawn."""
        looks = [CACHED if block in self.known else FREE for block in range(num_blocks)]
        for name, table in self.tables.items():
            for block in table:
                looks[block] = looks_by_name[name] if looks[block] in (CACHED, FREE) else SHARED
        return looks


# ---- drawing -----------------------------------------------------------------------------------------------------


def show_trace(path: Path, console: Console, max_rows: int) -> None:
    """Print what a trace says, with at most ``max_rows`` sequences in the timeline.

    Raises:
        TraceError: the file is no trace.
    """
    trace = load_trace(path)
    console.print(_summary(trace))
    if trace.broken_off:
        console.print("[yellow]The file has no end: the engine still runs, or was killed.[/yellow]")
        console.print("[yellow]文件没有结尾：引擎仍在运行，或已被终止。[/yellow]")
    if trace.steps:
        _print_timeline(trace, console, max_rows)
        _print_canvases(trace, console)
        _print_block_maps(trace, console)


def _summary(trace: Trace) -> Table:
    done = [step.args for step in trace.steps if not step.failed]
    table = Table(title="The run · 运行概况", title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="bold")
    table.add_column()

    busy = sum(step.duration for step in trace.steps)
    first, last = (trace.steps[0], trace.steps[-1]) if trace.steps else (None, None)
    span = last.start + last.duration - first.start if first and last else 0.0
    failed = f", {len(trace.steps) - len(done)} failed · 失败" if len(done) < len(trace.steps) else ""
    table.add_row("steps · 步数", f"{len(done)}{failed}")
    table.add_row("duration, in steps · 总时长，步内时长", f"{_time(span)}, {_time(busy)}")
    prompt, decode, sampled = (sum(args[k] for args in done) for k in ("prompt_tokens", "decode_tokens", "sampled"))
    table.add_row("prompt, decode tokens computed · 计算的词元", f"{prompt}, {decode}")
    table.add_row("tokens generated · 生成的词元", f"{sampled}")
    ends = Counter(row.reason for row in trace.rows)
    table.add_row("sequences · 序列", f"{len(trace.rows)} ({', '.join(f'{n} {reason}' for reason, n in ends.items())})")
    happened = Counter(instant.name for instant in trace.instants)
    swapped, recomputed = happened["preempted: swap"], happened["preempted: recompute"]
    table.add_row("preempted: swap, recompute · 抢占：换出、重算", f"{swapped}, {recomputed}")
    out, copied, back = (sum(len(step.args[k]) for step in trace.steps) for k in ("swap_out", "copy", "swap_in"))
    table.add_row("blocks swapped out, in · 换出、换入的块", f"{out}, {back}")
    table.add_row("forks, blocks copied on write · 分叉、写时复制", f"{happened['fork']}, {copied}")
    hits = sum(sum(step.args["prefix_hits"].values()) for step in trace.steps)
    table.add_row("prefix cache hits, in tokens · 前缀命中的词元", f"{hits}")
    for phase, label in PHASES.items():
        taken = sum(step.phases.get(phase, 0.0) for step in trace.steps)
        if taken:
            share = taken / busy
            table.add_row(f"{phase} · {label}", f"{share:4.0%} {'█' * round(12 * share):12} {_time(taken)}")
    return table


def _time(microseconds: float) -> str:
    return f"{microseconds / 1e6:.2f} s" if microseconds >= 1e6 else f"{microseconds / 1e3:.2f} ms"


def _print_timeline(trace: Trace, console: Console, max_rows: int) -> None:
    """A line for each sequence; a column for each step, or for several."""
    margin = NAME_WIDTH + 3
    room = max(console.width - margin - 19, 10)
    per_column = -(-len(trace.steps) // room)
    columns = [trace.steps[start : start + per_column] for start in range(0, len(trace.steps), per_column)]

    console.print("\n[bold]Timeline · 时间线[/bold]")
    steps = "one step" if per_column == 1 else f"{per_column} steps"
    console.print(f"A column is {steps}; at the right: prompt + generated tokens, and why it ended.", highlight=False)
    console.print(f"每列为 {per_column} 步；右侧：提示词 + 生成的词元数，结束原因。", highlight=False)
    ruler = f"step {trace.steps[0].args['step']}"
    ruler += f"{trace.steps[-1].args['step']:>{max(len(columns) - len(ruler), 6)}}"
    console.print(Text(" " * margin + ruler, style="dim"))
    for row in trace.rows[:max_rows]:
        line = Text.assemble((row.look.mark, row.look.style), f" {_fit(row.name)} ")
        for column in columns:
            states = {row.state_at(step.planned) for step in column}
            look = next((look for state, look in STATES.items() if state in states), None)
            line.append(look.mark if look else " ", look.style if look else "")
        generated = "?" if row.num_generated_tokens is None else row.num_generated_tokens
        line.append(f" {row.num_prompt_tokens}+{generated} {row.reason}")
        console.print(line, no_wrap=True, overflow="ellipsis", crop=True)
    if len(trace.rows) > max_rows:
        more = len(trace.rows) - max_rows
        console.print(f"... and {more} more sequences (--rows) · 还有 {more} 个序列", highlight=False)
    _print_legend(console, STATES.values())


def _print_canvases(trace: Trace, console: Console) -> None:
    """A line for each step that wrote on a canvas, or for some of them."""
    writes: dict[str, list[Instant]] = {}
    for instant in trace.instants:
        if instant.name == "write":
            writes.setdefault(instant.row.name, []).append(instant)
    if not writes:
        return
    console.print("\n[bold]Canvas · 画布[/bold]")
    console.print("The answer of a diffusion model after a step; new tokens are bold.", highlight=False)
    console.print("扩散模型的回答在各步之后的样子；新写出的词元为粗体。", highlight=False)
    for name, steps in list(writes.items())[:NUM_CANVASES]:
        shown = {len(steps) * line // CANVAS_LINES for line in range(1, CANVAS_LINES + 1)}
        cells: list[str | None] = [None] * max(step.args["places"] for step in steps)
        before = list(cells)
        table = Table.grid(padding=(0, 1))
        table.add_column(justify="right")
        table.add_column(overflow="fold")
        for number, step in enumerate(steps, 1):
            for place, text in step.args["cells"]:
                cells[place] = text
            if number in shown:
                table.add_row(str(number), draw_canvas(cells[: step.args["places"]], before))
                before = list(cells)
        console.print(Text(_fit(name).rstrip(), "dim"))
        console.print(table)
    if len(writes) > NUM_CANVASES:
        more = len(writes) - NUM_CANVASES
        console.print(f"... and {more} more canvases · 还有 {more} 个画布", highlight=False)


def _fit(name: str) -> str:
    """A name, printable, in exactly ``NAME_WIDTH`` cells; a long one loses its middle, as numbers are at the end."""
    name = "".join(character if character.isprintable() else "?" for character in name)
    if cell_len(name) > NAME_WIDTH:
        head, tail = set_cell_size(name, NAME_WIDTH // 2 - 1), set_cell_size(name[::-1], NAME_WIDTH // 2)[::-1]
        name = f"{head}…{tail}"
    return set_cell_size(name, NAME_WIDTH)


def _print_block_maps(trace: Trace, console: Console) -> None:
    """A cell for each block, or for several, at the moment when most are used and at others."""
    num_steps, room = len(trace.steps), console.width - 2
    peak = max(range(num_steps), key=lambda place: trace.steps[place].num_used_blocks)
    moments = {peak, *(num_steps * part // NUM_MAPS for part in range(1, NUM_MAPS))}
    per_cell = -(-trace.num_blocks // (room * MAP_ROWS))
    looks_by_name = {row.name: row.look for row in trace.rows}

    cells = "one block" if per_cell == 1 else f"{per_cell} blocks, drawn like most of them"
    console.print("\n[bold]Block map · 块分布[/bold]")
    console.print(f"A cell is {cells}; a block holds {trace.block_size} tokens.", highlight=False)
    console.print(f"每格为 {per_cell} 块（按多数着色）；每块 {trace.block_size} 个词元。", highlight=False)
    blocks = Blocks()
    for place, step in enumerate(blocks.replay(trace)):
        if place not in moments:
            continue
        looks = blocks.draw(trace.num_blocks, looks_by_name)
        num_free, num_cached, num_shared = (looks.count(look) for look in (FREE, CACHED, SHARED))
        used = trace.num_blocks - num_free - num_cached
        console.print(
            f"\n[bold]step {step.args['step']}{', peak · 峰值' if place == peak else ''}[/bold]: "
            f"{used} of {trace.num_blocks} used, {num_shared} of them shared; {num_cached} cached, {num_free} free",
            highlight=False,
        )
        cell_looks = [
            Counter(looks[start : start + per_cell]).most_common(1)[0][0]
            for start in range(0, trace.num_blocks, per_cell)
        ]
        for start in range(0, len(cell_looks), room):
            line = Text("  ")
            for look in cell_looks[start : start + room]:
                line.append(look.mark, look.style)
            console.print(line)
    console.print()
    _print_legend(
        console, (trace.rows[0].look._replace(label="held by sequence A · 序列 A 持有"), SHARED, CACHED, FREE)
    )


def _print_legend(console: Console, looks: Iterable[Look]) -> None:
    entries = [Text.assemble((f" {look.mark} ", look.style), f" {look.label}") for look in looks]
    console.print(Columns(entries, padding=(0, 3)))
