"""Processes that extract features and write labels, one file per task; existing files are kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import TypeVar

from ..errors import UserError
from ..utils.progress import progress
from ..utils.workers import in_order
from .features import Extractor, FeatureSource

Entries = list[tuple[str, int]]
Task = tuple[Path, Path, Entries]  # result file, root of the audio, utterances

T = TypeVar("T")
R = TypeVar("R")


class Pool:
    """Runs tasks that write one file each; existing files are kept."""

    def __init__(self, source: FeatureSource, workers: int, extractor: Extractor) -> None:
        self.source, self.workers, self.extractor = source, workers, extractor

    def run(self, function: Callable[..., int], tasks: list[Task], what: str) -> None:
        """Call `function(task, extractor=...)`, which returns its number of utterances, for each task without a file.

        Raises `UserError` if a process dies.
        """
        missing = [t for t in tasks if not t[0].exists()]
        with progress(what, sum(len(t[2]) for t in tasks)) as advance:
            advance(sum(len(t[2]) for t in tasks) - sum(len(t[2]) for t in missing))
            if self.workers == 1 or len(missing) < 2:
                with _threads(self.extractor, 1):
                    for task in missing:
                        advance(function(task, extractor=self.extractor))
                return
            count = min(self.workers, len(missing))
            pool = ProcessPoolExecutor(count, get_context("spawn"), _initialize, (self.source, count))
            try:
                for size in in_order(pool, partial(_in_process, function), missing, 2 * count):
                    advance(size)
            except BrokenProcessPool as error:
                raise UserError(
                    f"a process died while {what}, perhaps for lack of memory: finished shards are kept, run again with fewer --workers"
                ) from error
            except KeyboardInterrupt:  # unfinished shards are made again
                for process in active_children():
                    process.terminate()
                raise
            finally:
                pool.shutdown(cancel_futures=True)


_opened: Extractor | None = None  # the extractor of a worker process
_processes = 1


def _initialize(source: FeatureSource, processes: int) -> None:
    global _opened, _processes
    Thread(target=_end_with_parent, daemon=True).start()
    _opened, _processes = source.open(), processes


def _end_with_parent() -> None:
    """End this process with its parent; otherwise it would wait for work forever if the parent is killed."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _in_process(function: Callable[..., int], task: Task) -> int:
    assert _opened is not None
    with _threads(_opened, _processes):
        return function(task, extractor=_opened)


@contextmanager
def _threads(extractor: Extractor, processes: int) -> Iterator[None]:
    """Use a fair share of torch's threads, or one for features so small that threads only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // processes) if extractor.heavy else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
