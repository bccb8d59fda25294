"""Which of several ways to compute the same is the fastest on this very processor: it is tried.

A processor's name says little: on one, an instruction for bfloat16 makes a product twice as fast, and on another, which
has the same instruction, twice as slow. So the candidates for a weight's shape run at a few sizes, in turns, the first
time that such a weight is loaded; the times are kept in a file beside the compiled kernels, and from then on looked up.
A candidate takes the first one's place only if it is faster by more than such a measurement errs.

What was chosen stays the same while the process lives, so results do not depend on when something is measured. Two
processes that measured at different times may choose differently, and their results then differ in the last bits;
keeping the file, or `mini-infer kernels --measure` on an idle machine, settles it. A file that is damaged, or cannot be
written, costs another measurement and nothing else.
"""

import contextlib
import functools
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from mini_infer.kernels.cpu.cache import choices_file

logger = logging.getLogger(__name__)

Times = dict[str, dict[int, float]]
"""Seconds of each candidate at each size."""

ROUNDS = 5
"""Runs of each candidate at each size at most, of which the quickest counts."""

ENOUGH = 0.05
"""Seconds after which a size gets no further round, if there were two: long runs err less."""

HOPELESS = 1.5
"""A candidate that took so many times the best one's time is not run again."""

MARGIN = 0.95
"""A candidate must take less than this share of the first one's time to be taken instead."""


@functools.cache
def _known() -> dict[str, Times]:
    """What was measured on this processor, by this version of everything, here or in other processes."""
    path = choices_file()
    if path is None:
        return {}
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(key): {str(name): {int(size): float(s) for size, s in row.items()} for name, row in times.items()}
            for key, times in stored.items()
        }
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def times(key: str, names: Sequence[str], sizes: Sequence[int]) -> Times | None:
    """What was measured under a key, if it was all of these candidates at all of these sizes."""
    known = _known().get(_with_threads(key))
    fits = known is not None and set(known) == set(names) and all(set(row) == set(sizes) for row in known.values())
    return known if fits else None


def forget() -> None:
    """Whatever was measured is measured again when it is next needed."""
    _known().clear()
    _keep({})


def measure(key: str, candidates: Mapping[str, Callable[[int], object]], sizes: Sequence[int]) -> Times:
    """Run each candidate at each size, in turns, and keep the times."""
    found: Times = {name: {} for name in candidates}
    for size in sizes:
        best = dict.fromkeys(candidates, float("inf"))
        for run in candidates.values():
            run(size)  # compiles, allocates and fills caches
        start = time.perf_counter()
        for round_ in range(ROUNDS):
            hopeless = HOPELESS * min(best.values())
            for name, run in candidates.items():
                if round_ == 0 or best[name] <= hopeless:
                    begin = time.perf_counter()
                    run(size)
                    best[name] = min(best[name], time.perf_counter() - begin)
            if round_ and time.perf_counter() - start > ENOUGH:
                break
        for name, seconds in best.items():
            found[name][size] = seconds
    logger.info("measured %s: %s", key, found)
    known = _known()
    known[_with_threads(key)] = found
    _keep(known)
    return found


def fastest(found: Times) -> dict[int, str]:
    """The candidate for each size."""
    first = next(iter(found))
    chosen = {}
    for size in found[first]:
        best = min(found, key=lambda name: found[name][size])
        chosen[size] = best if found[best][size] < MARGIN * found[first][size] else first
    return chosen


def _with_threads(key: str) -> str:
    return f"{key}, {torch.get_num_threads()} threads"


def _keep(known: dict[str, Times]) -> None:
    path = choices_file()
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            try:
                json.dump(known, file, indent=1)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                file.close()
                Path(file.name).unlink()
                raise
