"""What earlier runs found out about files, one JSON line each, written as the work proceeds so that a restart can reuse it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import IO

from ..errors import WriteError

Values = tuple[float, ...]


class Index:
    """Numbers by key. Lines of the file count if they are a key and `length` numbers; the last line of a key wins.

    Lines are kept in memory until `keep`, so a run that must fail leaves nothing behind. Raises `WriteError` on a full disk.
    """

    def __init__(self, path: Path, length: int) -> None:
        self.path = path
        self.lock = Lock()
        self.waiting: list[str] = []
        self.keeping = False
        self.file: IO[str] | None = None
        self.known: dict[str, Values] = {}
        if path.is_file():
            with path.open(encoding="utf-8", errors="replace") as lines:
                self.known.update(_entries(lines, length))

    def get(self, key: str) -> Values | None:
        """The numbers of a key, or None."""
        return self.known.get(key)

    def add(self, key: str, *values: float) -> None:
        """Remember numbers for the next run."""
        with self.lock:
            self.waiting.append(json.dumps([key, *values]))
            if self.keeping:
                self._write()

    def keep(self) -> None:
        """Write the lines in memory, and from now on every line at once."""
        with self.lock:
            self.keeping = True
            if self.waiting:
                self._write()

    def close(self) -> None:
        """Close the file; lines in memory are dropped."""
        with self.lock:
            if self.file:
                with suppress(OSError):  # every line was flushed, or its error was raised
                    self.file.close()
                self.file = None

    def _write(self) -> None:
        try:
            if self.file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file = self.path.open("a", encoding="utf-8")
            self.file.write("".join(f"\n{line}\n" for line in self.waiting))
            self.file.flush()
        except OSError as error:
            raise WriteError(error.errno, error.strerror, str(self.path)) from error
        self.waiting.clear()


def _entries(lines: Iterable[str], length: int) -> Iterator[tuple[str, Values]]:
    for line in lines:
        try:
            key, *values = json.loads(line)
        except (ValueError, TypeError, RecursionError):  # cut off by a crash, or damaged
            continue
        if isinstance(key, str) and len(values) == length and all(type(v) in (int, float) for v in values):
            yield key, tuple(values)
