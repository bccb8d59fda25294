"""The trace: a file that says what every step did and how long it took. Perfetto (https://ui.perfetto.dev) opens it.

The format is Chrome's: a JSON array of events, here one to a line. Readers accept an array without its closing bracket,
so whatever ends the process, the steps before that can be looked at.

    process "Mini-Infer engine"   a slice for each step with its phases inside, and counters
    process "Sequences"           a track for each sequence: the states it goes through, and what happens to it

The loop knows nothing of all this: when a trace is asked for, a scheduler and a runner that also report to it take the
place of the plain ones.
"""

import json
import logging
import os
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass, field, replace
from io import FileIO
from itertools import count
from typing import Any

from torch import Tensor

from mini_infer.engine.loop import EngineLoop, LoopCounts, StepResult
from mini_infer.engine.model_runner import ModelRunner
from mini_infer.exceptions import InvalidConfigError
from mini_infer.memory import BlockManager
from mini_infer.outputs import FinishReason
from mini_infer.scheduler import Scheduler, SchedulerOutputs, Sequence, SequenceStatus
from mini_infer.typing import BlockTable, SequenceMetadata

logger = logging.getLogger(__name__)

_ENGINE, _SEQUENCES = 1, 2
"""Process ids in the file; all they do is group tracks."""

_STEPS = 1
"""Thread id of the engine's steps."""

_WAITING_STATES = ("waiting", "swapped", "preempted")


class TraceFile:
    """Collects events, and writes them a step's worth at a time.

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

    def now(self) -> int:
        """Nanoseconds since the file was opened."""
        return time.perf_counter_ns() - self._start

    def add(self, kind: str, name: str, at: int, pid: int, tid: int, **fields: Any) -> None:
        """Add an event at the time ``at``; the format's letter ``kind`` says what it is and which ``fields`` it has."""
        event = {"ph": kind, "name": name, "ts": at / 1000, "pid": pid, "tid": tid, **fields}
        self._events.append(self._separator + self._encode(event))
        self._separator = ",\n"

    def flush(self) -> None:
        """Write what was added. Should that fail, the trace ends there; the engine goes on."""
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
        name: the request's id; for a fork, with a number behind it.
        fork_numbers: counts the forks of all sequences of the request.
        state: the last that was entered.
        block_table: as the trace has it.
    """

    tid: int
    name: str
    fork_numbers: Iterator[int]
    state: str
    block_table: BlockTable


@dataclass(slots=True)
class _Step:
    """A step under way.

    Attributes:
        start: when it began.
        args: what it did.
        phases: those that have ended, each with its start and end.
        preempted: whose blocks it took, and what became of them.
    """

    start: int
    args: dict[str, Any] = field(default_factory=dict)
    phases: list[tuple[str, int, int]] = field(default_factory=list)
    preempted: dict[str, str] = field(default_factory=dict)


class StepTrace:
    """Puts what happens to steps and sequences into a file.

    Args:
        file: where to.
        blocks: whose blocks are counted.
    """

    def __init__(self, file: TraceFile, blocks: BlockManager) -> None:
        self._file = file
        self._blocks = blocks
        self._tracks: dict[Sequence, _Track] = {}
        self._states: Counter[str] = Counter()
        self._tids = count(1)
        self._step: _Step | None = None
        self._ended: list[tuple[Sequence, int]] = []
        about = {"block_size": blocks.block_size, "blocks": blocks.num_gpu_blocks, "cpu_blocks": blocks.num_cpu_blocks}
        for place, (pid, name) in enumerate(((_ENGINE, "Mini-Infer engine"), (_SEQUENCES, "Sequences"))):
            file.add("M", "process_name", 0, pid, 0, args={"name": name})
            file.add("M", "process_sort_index", 0, pid, 0, args={"sort_index": place})
        file.add("M", "thread_name", 0, _ENGINE, _STEPS, args={"name": "steps"})
        file.add("i", "mini-infer", 0, _ENGINE, _STEPS, s="t", args=about)
        file.flush()

    # ---- steps ---------------------------------------------------------------------------------------------------

    def step(self, loop: EngineLoop) -> StepResult:
        """Let the loop advance, and trace that."""
        step = self._step = _Step(self._file.now())
        before = replace(loop.counts)
        try:
            return loop.advance()
        except BaseException as error:
            step.args["error"] = repr(error)
            raise
        finally:
            self._step = None
            if "ran" in step.args:
                self._write_step(step, before, loop.counts)
            self._write_ends()
            self._file.flush()

    def end_phase(self, name: str) -> None:
        """The phase ``name`` of the current step ends now, and the next one begins.

        A GPU computes while the host goes on: "forward" is then the time to launch it, and "sample" waits for it.
        """
        if self._step is not None:
            self._end_phase(self._step, name)

    def preempted(self, sequence: Sequence) -> None:
        """The current step takes a sequence's blocks."""
        track, now = self._tracks[sequence], self._file.now()
        how, state = ("swap", "swapped") if sequence.swapped_blocks else ("recompute", "preempted")
        if self._step is not None:
            self._step.preempted[track.name] = how
        self._note(track, f"preempted: {how}", now, {"blocks": len(track.block_table)})
        self._enter(track, state, now)
        track.block_table = []

    def planned(self, plan: SchedulerOutputs, running: Seq[Sequence]) -> None:
        """The current step has its plan: note who runs, who does not, and whose blocks changed."""
        if self._step is None or not plan.scheduled:
            return
        now = self._end_phase(self._step, "schedule")
        tables: dict[str, BlockTable] = {}
        prefix_hits: dict[str, int] = {}
        swapped_in = {copy.target for copy in plan.swap_in}
        num_new_tokens = dict(plan.scheduled)
        num_decodes = 0

        for sequence in running:
            track = self._tracks[sequence]
            num_new = num_new_tokens.get(sequence, 0)
            if track.state in _WAITING_STATES:
                computed = sequence.block_table[: self._blocks.blocks_for(sequence.num_computed_tokens)]
                found = sum(block not in swapped_in for block in computed)
                if found:
                    prefix_hits[track.name] = found * self._blocks.block_size
            if num_new == 0:
                self._enter(track, "paused", now)
            elif num_new == 1 and len(sequence) > sequence.num_prompt_tokens:
                num_decodes += 1
                self._enter(track, "decode", now)
            else:
                about = {"tokens": num_new, "after": sequence.num_computed_tokens}
                self._enter(track, "prompt", now, about)
            if track.block_table != sequence.block_table:
                tables[track.name] = track.block_table = list(sequence.block_table)

        num_prompt_tokens = plan.num_tokens - num_decodes
        self._step.args |= {
            "ran": {self._tracks[sequence].name: num_new for sequence, num_new in plan.scheduled},
            "prompt_tokens": num_prompt_tokens,
            "decode_tokens": num_decodes,
            "preempted": self._step.preempted,
            "prefix_hits": prefix_hits,
            "block_tables": tables,
            "remembered": plan.remembered,
            "swap_out": plan.swap_out,
            "copy": plan.copy,
            "swap_in": plan.swap_in,
        }
        self._count(now, num_prompt_tokens, num_decodes)

    def _end_phase(self, step: _Step, name: str) -> int:
        now = self._file.now()
        step.phases.append((name, step.phases[-1][2] if step.phases else step.start, now))
        return now

    def _write_step(self, step: _Step, before: LoopCounts, after: LoopCounts) -> None:
        undone = after.num_steps == before.num_steps
        end = self._end_phase(step, "undo" if undone else "publish")
        num_sampled = after.num_generated_tokens - before.num_generated_tokens
        args = {"step": before.num_steps + 1, **step.args, "sampled": num_sampled}
        self._slice("failed step" if undone else "step", step.start, end, args)
        for phase in step.phases:
            self._slice(*phase, {})
        self._count(end, 0, 0)

    def _slice(self, name: str, start: int, end: int, args: dict[str, Any]) -> None:
        self._file.add("X", name, start, _ENGINE, _STEPS, dur=(end - start) / 1000, args=args)

    def _count(self, now: int, num_prompt_tokens: int, num_decodes: int) -> None:
        blocks, states = self._blocks, self._states
        num_waiting = sum(states[state] for state in _WAITING_STATES)
        sequences = {
            "running": len(self._tracks) - num_waiting - len(self._ended),
            "waiting": num_waiting,
            "swapped": states["swapped"],
        }
        used = {
            "used": blocks.num_used_blocks,
            "cached": blocks.num_cached_blocks,
            "free": blocks.num_free_blocks,
        }
        tokens = {"prompt": num_prompt_tokens, "decode": num_decodes}
        for name, values in (("sequences", sequences), ("blocks", used), ("tokens", tokens)):
            self._file.add("C", name, now, _ENGINE, 0, args=values)

    # ---- sequences -----------------------------------------------------------------------------------------------

    def arrived(self, sequence: Sequence) -> None:
        """A sequence waits."""
        self._begin(sequence, sequence.request_id, count(1), "waiting", [])

    def forked(self, parent: Sequence, child: Sequence) -> None:
        """``child`` goes on from where ``parent`` is."""
        origin = self._tracks[parent]
        name = f"{parent.request_id} #{next(origin.fork_numbers)}"
        state = "decode" if child.block_table else "waiting"
        track = self._begin(child, name, origin.fork_numbers, state, list(child.block_table))
        self._note(track, "fork", self._file.now(), {"parent": origin.name, "block_table": track.block_table})

    def undone(self, plan: SchedulerOutputs) -> None:
        """The current step failed: those in its plan have lost their blocks, or what was copied of them, and wait."""
        now = self._file.now()
        for sequence in (*plan.preempted, *(sequence for sequence, _ in plan.scheduled)):
            if sequence.status is not SequenceStatus.FINISHED:
                track = self._tracks[sequence]
                track.block_table = []
                self._note(track, "undone", now, {})
                self._enter(track, "preempted", now)

    def ended(self, sequence: Sequence) -> None:
        """A sequence has ended, or was ended."""
        if sequence in self._tracks:  # not one that was yet to fork
            self._states[self._tracks[sequence].state] -= 1
            self._ended.append((sequence, self._file.now()))
            if self._step is None:
                self._write_ends()
                self._count(self._file.now(), 0, 0)

    def _write_ends(self) -> None:
        """Within a step, ends are written last: the reason may change until then."""
        for sequence, at in self._ended:
            track = self._tracks.pop(sequence)
            about = {"reason": sequence.finish_reason, "tokens": sequence.num_generated_tokens}
            self._file.add("E", track.state, at, _SEQUENCES, track.tid)
            self._note(track, "finish", at, about)
        self._ended.clear()

    def _begin(
        self, sequence: Sequence, name: str, fork_numbers: Iterator[int], state: str, block_table: BlockTable
    ) -> _Track:
        track = self._tracks[sequence] = _Track(next(self._tids), name, fork_numbers, state, block_table)
        self._states[state] += 1
        self._file.add("M", "thread_name", 0, _SEQUENCES, track.tid, args={"name": name})
        self._file.add("M", "thread_sort_index", 0, _SEQUENCES, track.tid, args={"sort_index": track.tid})
        about = {"prompt_tokens": sequence.num_prompt_tokens}
        self._file.add("B", state, self._file.now(), _SEQUENCES, track.tid, args=about)
        return track

    def _enter(self, track: _Track, state: str, now: int, about: Mapping[str, int] | None = None) -> None:
        """The sequence's state is another from now on; every prompt chunk is one of its own."""
        if state == track.state and state != "prompt":
            return
        self._file.add("E", track.state, now, _SEQUENCES, track.tid)
        self._file.add("B", state, now, _SEQUENCES, track.tid, args=dict(about or {}))
        self._states[track.state] -= 1
        self._states[state] += 1
        track.state = state

    def _note(self, track: _Track, what: str, now: int, about: Mapping[str, Any]) -> None:
        self._file.add("i", what, now, _SEQUENCES, track.tid, s="t", args=dict(about))


class TracedScheduler(Scheduler):
    """A scheduler that reports what becomes of each sequence.

    Args:
        trace: whom to.
        arguments, options: as for ``Scheduler``.
    """

    def __init__(self, trace: StepTrace, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._trace = trace

    def add(self, sequence: Sequence) -> None:
        super().add(sequence)
        self._trace.arrived(sequence)

    def schedule(self) -> SchedulerOutputs:
        plan = super().schedule()
        self._trace.planned(plan, self.running)
        return plan

    def advance(self, plan: SchedulerOutputs) -> list[Sequence]:
        self._trace.end_phase("sample")
        return super().advance(plan)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        super().fork(parent, child)
        self._trace.forked(parent, child)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        super().finish(sequence, reason)
        self._trace.ended(sequence)

    def _preempt(self, sequence: Sequence, plan: SchedulerOutputs) -> None:
        super()._preempt(sequence, plan)
        self._trace.preempted(sequence)

    def undo(self, plan: SchedulerOutputs) -> None:
        super().undo(plan)
        self._trace.undone(plan)


@dataclass(frozen=True)
class TracedRunner(ModelRunner):
    """A runner that reports when its phases end.

    Attributes:
        trace: whom to.
    """

    trace: StepTrace

    def copy_blocks(self, plan: SchedulerOutputs) -> None:
        super().copy_blocks(plan)
        self.trace.end_phase("copy")

    def forward(self, scheduled: Seq[tuple[SequenceMetadata, int]]) -> Tensor:
        hidden = super().forward(scheduled)
        self.trace.end_phase("forward")
        return hidden
