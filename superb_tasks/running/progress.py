"""Shows S3PRL's progress if stderr is not a terminal: a line per minute and training run instead of bars that are redrawn."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from tqdm import tqdm

SECONDS = 60.0  # between two lines


class Lines(tqdm):
    """A bar of S3PRL that counts without drawing; only the bar over all updates, which it counts itself, prints a line now and then."""

    def __init__(self, *args: Any, **keys: Any) -> None:
        self.said = time.monotonic()
        super().__init__(*args, **{**keys, "file": io.StringIO()})

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Print a line if one is due."""
        now = time.monotonic()
        if self.iterable is None and self.total and 0 < self.n < self.total and now - self.said >= SECONDS:
            self.said = now
            figures = self.format_dict
            left = (self.total - self.n) / figures["rate"] if figures.get("rate") else None
            ends = f", about {tqdm.format_interval(left)} left" if left is not None else ""
            print(f"-- update {self.n:,} of {self.total:,}{ends}", file=sys.stderr, flush=True)
        return True


@contextmanager
def lines_for_bars(module: ModuleType) -> Iterator[None]:
    """Make a module of S3PRL that trains and evaluates print lines instead of bars inside, unless stderr is a terminal."""
    before: Any = vars(module)["tqdm"]
    if not sys.stderr.isatty():
        vars(module)["tqdm"] = Lines
    try:
        yield
    finally:
        vars(module)["tqdm"] = before
