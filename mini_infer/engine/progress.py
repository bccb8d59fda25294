"""The bar that ``generate`` shows."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def generation_progress(num_requests: int, wanted: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, or below the cell of a notebook; none where it would end up in a file.

    Yields:
        A function to call with the numbers of requests finished and tokens generated so far.
    """
    console = Console(stderr=True)
    if not wanted or not (console.is_terminal or console.is_jupyter):
        yield lambda finished, tokens: None
        return
    columns = (
        TextColumn("Generating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:.0f} tok/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("Generating", total=num_requests, speed=0.0)
        start = time.monotonic()
        yield lambda finished, tokens: bar.update(
            task, completed=finished, speed=tokens / (time.monotonic() - start + 1e-9)
        )
