"""Shows the progress of a long job on stderr: a bar on a terminal, otherwise a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_SECONDS = 10.0  # seconds between plain lines


@contextmanager
def progress(what: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
    """Yield `advance(n)`, to be called after `n` more of `total` steps. Jobs shorter than `LINE_SECONDS` print no plain line.

    `total` may be an estimate: no more than it is shown. `unit` follows the numbers.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda n: bar.update(task, completed=min(bar.tasks[task].completed + n, total))
        return
    done, began = 0, time.monotonic()
    last = began

    def advance(n: int) -> None:
        nonlocal done, last
        done = min(done + n, total)
        now = time.monotonic()
        if now - last >= LINE_SECONDS:
            last = now
            left = (now - began) / max(done, 1) * (total - done)
            print(f"{what}: {done} of {total}{unit and ' '}{unit}, about {left:.0f} s left", file=sys.stderr, flush=True)

    yield advance
