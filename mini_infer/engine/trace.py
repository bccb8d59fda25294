"""The trace: a file that says what every step did and how long it took. Perfetto (https://ui.perfetto.dev) opens it.

The format is Chrome's: a JSON array of events, here one to a line. Readers accept an array without its closing bracket,
so whatever ends the process, the steps before that can be looked at.

    process "Mini-Infer engine"   a slice for each step with its phases inside, and counters; where several steps are
                                  under way at a time, each has a track
    process "Sequences"           a track for each sequence: the states it goes through, and what happens to it

A step's phases are those that the host sees: "schedule" makes the plan; "submit" makes a step of it and hands it over,
which on a GPU takes as long as to launch it; "compute" lasts until its result was read; "publish" commits it and tells
everybody. A step that failed ends with "rewind".

On the track of a sequence of a diffusion model, "write" says which places of its canvas a step wrote, with what.
"""

import json
import logging
import os
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from itertools import count
from typing import Any

from mini_infer.engine.detokenizer import canvas_cells
from mini_infer.engine.loop import Flight, StepObserver, StepResult
from mini_infer.engine.request import Request
from mini_infer.exceptions import InvalidConfigError
from mini_infer.outputs import FinishReason
from mini_infer.scheduler import Scheduler, SchedulerOutputs, Sequence, SequenceStatus
from mini_infer.step import StepOutput
from mini_infer.typing import BlockTable

logger = logging.getLogger(__name__)

_ENGINE, _SEQUENCES = 1, 2
"""Process ids in the file; all they do is group tracks."""

_WAITING_STATES = ("waiting", "swapped", "preempted")


class TraceFile:
    """Collects events, and writes them a step's worth at a time. Times are those of ``time.perf_counter_ns``.

    Args:
        path: replaced if it exists.

    Raises:
        InvalidConfigError: it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        try:
            if os.path.isfile(path):  # made anew: an engine that still writes to the old one must not write into this
                os.unlink(path)
            self._file = FileIO(path, "w")
        except (OSError, ValueError) as error:
            raise InvalidConfigError(
                f"trace={os.fspath(path)!r} cannot be written ({error}); name a file in a directory that you may write"
            ) from error
        self._start = time.perf_counter_ns()
        self._encode = json.JSONEncoder(separators=(",", ":")).encode
        self._separator = "\n"
        self._events = ["["]
        self.close = weakref.finalize(self, _close, self._file, self._events)  # when the process exits, at the latest

    def add(self, kind: str, name: str, at: int | None, pid: int, tid: int, **fields: Any) -> None:
        """Add an event at the time ``at``, None for what is of no time; the format's letter ``kind`` says what it is
        and which ``fields`` it has."""
        microseconds = 0 if at is None else (at - self._start) / 1000
        event = {"ph": kind, "name": name, "ts": microseconds, "pid": pid, "tid": tid, **fields}
        self._events.append(self._separator + self._encode(event))
        self._separator = ",\n"

    def flush(self) -> None:
        """Write what was added. Should that fail, the trace ends there; the engine goes on."""
        if not self.close.alive:
            return
        try:
            self._file.write("".join(self._events).encode())
        except (OSError, ValueError) as error:  # the disk is full; or the process is ending, and the file is closed
            logger.error("trace %r ends here: %s", self._file.name, error)
            self.close.detach()
            self._file = FileIO(os.devnull, "w")
        self._events.clear()


def _close(file: FileIO, events: list[str]) -> None:
    with file, suppress(OSError):  # nobody is left who could do anything about it, and what was written is readable
        file.write("".join([*events, "\n]\n"]).encode())


@dataclass(slots=True)
class _Track:
    """A sequence's track.

    Attributes:
        tid: its thread id.
        name: the request's id; for its further sequences, with a number behind it.
        state: the last that was entered.
        since: when its request arrived.
        num_seen: on the track of a request's first sequence: how many of its sequences were seen in a step.
        block_table, cells: its blocks and its canvas, as the trace has them.
    """

    tid: int
    name: str
    state: str
    since: int
    num_seen: int = 0
    block_table: BlockTable = field(default_factory=list)
    cells: list[str | None] = field(default_factory=list)


@dataclass(slots=True)
class _Step:
    """A step under way.

    Attributes:
        lane: its track.
        marks: when it began, and when each of its phases ended.
        args: what it is about.
    """

    lane: int
    marks: list[int]
    args: dict[str, Any]


class StepTrace(StepObserver):
    """An observer of the loop that puts what happens to steps and sequences into a file.

    Args:
        path: of the file.
        scheduler: the loop's; looked at, never changed.
        token_bytes: what a token adds to a text.

    Raises:
        InvalidConfigError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], scheduler: Scheduler, token_bytes: Callable[[int], bytes]) -> None:
        self._file = TraceFile(path)
        self._token_bytes = token_bytes
        self._scheduler, self._blocks = scheduler, scheduler.block_manager
        self._tids = count(1)
        self._firsts: dict[str, _Track] = {}  # of each request, from when it arrives
        self._tracks: dict[Sequence, _Track] = {}  # of each sequence, from when it is in a step
        self._steps: list[_Step] = []  # under way, the oldest first
        self._num_lanes = 0
        self._num_steps = 0
        for place, (pid, name) in enumerate(((_ENGINE, "Mini-Infer engine"), (_SEQUENCES, "Sequences"))):
            self._file.add("M", "process_name", None, pid, 0, args={"name": name})
            self._file.add("M", "process_sort_index", None, pid, 0, args={"sort_index": place})
        self._add_lane()
        blocks = self._blocks
        about = {"block_size": blocks.block_size, "blocks": blocks.num_gpu_blocks, "cpu_blocks": blocks.num_cpu_blocks}
        self._file.add("i", "mini-infer", None, _ENGINE, 1, s="t", args=about)
        self._file.flush()

    # ---- what the loop tells -------------------------------------------------------------------------------------

    def arrived(self, request: Request) -> None:
        now = time.perf_counter_ns()
        track = self._begin(request.request_id, "waiting", now, len(request.prompt_token_ids))
        self._firsts[request.request_id] = track

    def planned(self, plan: SchedulerOutputs, began: int) -> None:
        now = time.perf_counter_ns()
        preempted: dict[str, str] = {}
        for sequence in plan.preempted:
            track = self._tracks[sequence]
            how, state = ("swap", "swapped") if sequence.swapped_blocks else ("recompute", "preempted")
            preempted[track.name] = how
            self._note(track, f"preempted: {how}", now, blocks=len(track.block_table))
            self._enter(track, state, now)
            track.block_table = []

        ran: dict[str, int] = {}
        found_blocks: dict[str, int] = {}
        prefix_hits: dict[str, int] = {}
        swapped_in = {copy.target for copy in plan.swap_in}
        for item in plan.scheduled:
            track = self._track_of(item.sequence, now)
            ran[track.name] = item.num_tokens
            if track.state in _WAITING_STATES:
                computed = item.sequence.block_table[: self._blocks.blocks_for(item.start)]
                num_found = sum(block not in swapped_in for block in computed)
                if num_found:
                    found_blocks[track.name] = num_found
                    num_hits = min(num_found * self._blocks.block_size, item.sequence.num_prompt_tokens)
                    prefix_hits[track.name] = num_hits
            if item.is_decode:
                self._enter(track, "decode", now)
            else:
                self._enter(track, "prompt", now, tokens=item.num_tokens, after=item.start)

        tables: dict[str, BlockTable] = {}
        self._note_forks(now)
        for sequence in self._scheduler.running:
            track = self._tracks[sequence]
            if track.name not in ran:
                self._enter(track, "paused", now)
            if track.block_table != sequence.block_table:
                tables[track.name] = track.block_table = list(sequence.block_table)

        num_decode_tokens = sum(item.num_tokens for item in plan.scheduled if item.is_decode)
        args = {
            "ran": ran,
            "prompt_tokens": plan.num_tokens - num_decode_tokens,
            "decode_tokens": num_decode_tokens,
            "preempted": preempted,
            "prefix_hits": prefix_hits,
            "found_blocks": found_blocks,
            "block_tables": tables,
            "remembered": plan.remembered,
            "swap_out": plan.swap_out,
            "copy": plan.copy,
            "swap_in": plan.swap_in,
        }
        taken = {step.lane for step in self._steps}
        lane = next(lane for lane in count(1) if lane not in taken)
        if lane > self._num_lanes:
            self._add_lane()
        self._steps.append(_Step(lane, [began, now], args))
        self._count(now)

    def submitted(self, flight: Flight) -> None:
        self._steps[-1].marks.append(time.perf_counter_ns())

    def computed(self, flight: Flight, output: StepOutput) -> None:
        self._steps[0].marks.append(time.perf_counter_ns())

    def committed(self, flight: Flight, result: StepResult) -> None:
        now = time.perf_counter_ns()
        for item in flight.plan.scheduled:
            if item.sequence in self._tracks:  # else it has ended
                self._note_writes(item.sequence, now)
        self._end_all([known for known in self._tracks if known.status is SequenceStatus.FINISHED], now)
        self._note_forks(now)  # those of a beam search
        self._num_steps += 1
        self._write(self._steps.pop(0), "step", "publish", now, self._num_steps, sampled=result.num_generated_tokens)
        self._count(now)
        self._file.flush()

    def rewound(self, plans: list[SchedulerOutputs], error: BaseException) -> None:
        now = time.perf_counter_ns()
        touched: dict[Sequence, None] = {}
        for plan in plans:
            touched |= dict.fromkeys(plan.preempted)
            for item in plan.scheduled:
                touched |= dict.fromkeys((item.sequence, *item.forks))
        for sequence in touched:
            track = self._tracks.get(sequence)
            if track is not None and sequence.status is not SequenceStatus.FINISHED:
                track.block_table = []
                self._note(track, "undone", now)
                self._enter(track, "preempted", now)
        for number, step in enumerate(self._steps, self._num_steps + 1):
            self._write(step, "failed step", "rewind", now, number, sampled=0, error=repr(error))
        self._steps.clear()
        self._count(now)
        self._file.flush()

    def ended(self, request: Request) -> None:
        now = time.perf_counter_ns()
        first = self._firsts.pop(request.request_id)
        self._end_all([known for known in self._tracks if known.request_id == request.request_id], now)
        if first.num_seen == 0:
            self._end(first, now, request.completions[0].finish_reason, 0)
        if not self._steps:
            self._count(now)

    def closed(self) -> None:
        self._file.close()

    # ---- steps ---------------------------------------------------------------------------------------------------

    def _add_lane(self) -> None:
        self._num_lanes += 1
        name = "steps" if self._num_lanes == 1 else f"steps, {self._num_lanes} under way"
        self._file.add("M", "thread_name", None, _ENGINE, self._num_lanes, args={"name": name})

    def _write(self, step: _Step, name: str, last_phase: str, now: int, number: int, **args: Any) -> None:
        ends = [*step.marks[1:], now]
        phases = [*("schedule", "submit", "compute")[: len(ends) - 1], last_phase]
        self._slice(name, step.marks[0], now, step.lane, {"step": number, **step.args, **args})
        for phase, start, end in zip(phases, step.marks, ends, strict=True):
            self._slice(phase, start, end, step.lane, {})

    def _slice(self, name: str, start: int, end: int, lane: int, args: dict[str, Any]) -> None:
        self._file.add("X", name, start, _ENGINE, lane, dur=(end - start) / 1000, args=args)

    def _count(self, now: int) -> None:
        scheduler, blocks, steps = self._scheduler, self._blocks, self._steps
        num_swapped = sum(track.state == "swapped" for track in self._tracks.values())
        used = {"used": blocks.num_used_blocks, "cached": blocks.num_cached_blocks, "free": blocks.num_free_blocks}
        for name, values in (
            (
                "sequences",
                {"running": len(scheduler.running), "waiting": len(scheduler.waiting), "swapped": num_swapped},
            ),
            ("blocks", used),
            ("tokens", {kind: sum(step.args[f"{kind}_tokens"] for step in steps) for kind in ("prompt", "decode")}),
        ):
            self._file.add("C", name, now, _ENGINE, 0, args=values)

    # ---- sequences -----------------------------------------------------------------------------------------------

    def _track_of(self, sequence: Sequence, now: int) -> _Track:
        """The track of a sequence in a plan; one that is seen for the first time has waited until now."""
        if sequence not in self._tracks:
            first = self._firsts[sequence.request_id]
            if first.num_seen == 0:
                first.num_seen, self._tracks[sequence] = 1, first
            else:  # it has waited like the first one, or has forked from another
                self._add(sequence, first, "waiting", now if sequence.num_generated_tokens else first.since)
        return self._tracks[sequence]

    def _note_forks(self, now: int) -> None:
        """Who runs and was never in a plan has forked from another."""
        for sequence in self._scheduler.running:
            if sequence not in self._tracks:
                track = self._add(sequence, self._firsts[sequence.request_id], "paused", now)
                track.block_table = list(sequence.block_table)
                self._note(track, "fork", now, block_table=track.block_table)

    def _note_writes(self, sequence: Sequence, now: int) -> None:
        track, cells = self._tracks[sequence], canvas_cells(sequence.canvas, self._token_bytes)
        before = [*track.cells, *[None] * (len(cells) - len(track.cells))]
        written = [[place, new] for place, (old, new) in enumerate(zip(before, cells, strict=False)) if new != old]
        if written:
            track.cells = cells
            self._note(track, "write", now, cells=written, places=len(cells))

    def _add(self, sequence: Sequence, first: _Track, state: str, since: int) -> _Track:
        """A track for a request's further sequence."""
        name = f"{first.name} #{first.num_seen}"
        first.num_seen += 1
        track = self._tracks[sequence] = self._begin(name, state, since, sequence.num_prompt_tokens)
        return track

    def _begin(self, name: str, state: str, since: int, num_prompt_tokens: int) -> _Track:
        track = _Track(next(self._tids), name, state, since)
        self._file.add("M", "thread_name", None, _SEQUENCES, track.tid, args={"name": name})
        self._file.add("M", "thread_sort_index", None, _SEQUENCES, track.tid, args={"sort_index": track.tid})
        self._file.add("B", state, since, _SEQUENCES, track.tid, args={"prompt_tokens": num_prompt_tokens})
        return track

    def _enter(self, track: _Track, state: str, now: int, **about: int) -> None:
        """The sequence's state is another from now on; every prompt chunk is one of its own."""
        if state != track.state or state == "prompt":
            self._file.add("E", track.state, now, _SEQUENCES, track.tid)
            self._file.add("B", state, now, _SEQUENCES, track.tid, args=about)
            track.state = state

    def _end_all(self, sequences: list[Sequence], now: int) -> None:
        for sequence in sequences:
            self._note_writes(sequence, now)
            self._end(self._tracks.pop(sequence), now, sequence.finish_reason, sequence.num_generated_tokens)

    def _end(self, track: _Track, now: int, reason: FinishReason | None, num_tokens: int) -> None:
        self._file.add("E", track.state, now, _SEQUENCES, track.tid)
        self._note(track, "finish", now, reason=reason, tokens=num_tokens)

    def _note(self, track: _Track, what: str, now: int, **about: Any) -> None:
        self._file.add("i", what, now, _SEQUENCES, track.tid, s="t", args=about)
