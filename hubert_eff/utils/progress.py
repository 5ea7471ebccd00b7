"""Shows the progress of a long job on stderr: a bar on a terminal, otherwise a plain line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread

LINE_SECONDS = 10.0  # seconds between plain lines


@contextmanager
def progress(what: str, total: int, unit: str = "", at_most: bool = False) -> Iterator[Callable[[int], None]]:
    """Yield `advance(n)`, to be called after `n` more of `total` steps. Jobs shorter than `LINE_SECONDS` print no plain line.

    Plain lines come from a thread, so that a long step does not look like a job that hangs. `total` may be an estimate: no more than it is
    shown. `unit` follows the numbers. `at_most`: the job may stop before `total` steps, so the time left is not shown.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        time_column = TimeElapsedColumn() if at_most else TimeRemainingColumn()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), time_column)
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda n: bar.update(task, completed=min(bar.tasks[task].completed + n, total))
        return
    done, began, ended = 0, time.monotonic(), Event()

    def advance(n: int) -> None:
        nonlocal done
        done = min(done + n, total)

    def lines() -> None:
        while not ended.wait(LINE_SECONDS):
            taken = time.monotonic() - began
            left = f", about {taken / done * (total - done):.0f} s left" if done and not at_most else f", {taken:.0f} s so far"
            print(f"{what}: {done} of {'at most ' if at_most else ''}{total}{unit and ' '}{unit}{left}", file=sys.stderr, flush=True)

    printer = Thread(target=lines, daemon=True)
    printer.start()
    try:
        yield advance
    finally:
        ended.set()
        printer.join()
