"""Tasks spread over processes or threads, with few of them waiting at a time however many there are."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import TypeVar

from ..errors import UserError
from ..progress import progress
from .features import Extractor, FeatureSource

Entries = list[tuple[str, int]]
Task = tuple[Path, Path, Entries]  # result file, root of the audio, utterances

T = TypeVar("T")
R = TypeVar("R")


def in_order(executor: Executor, function: Callable[[T], R], items: Iterable[T], ahead: int) -> Iterator[R]:
    """Results in the order of `items`; at most `ahead` of them are submitted before they are wanted. On an error the rest is cancelled."""
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            with _without_interrupts():  # a process that this starts leaves a terminal's SIGINT to this one
                pending.append(executor.submit(function, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


@contextmanager
def _without_interrupts() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Pool:
    """Runs tasks that write one file each; files that are there are kept."""

    def __init__(self, source: FeatureSource, workers: int, extractor: Extractor) -> None:
        self.source, self.workers, self.extractor = source, workers, extractor

    def run(self, function: Callable[..., int], tasks: list[Task], what: str) -> None:
        """Call `function(task, extractor=...)`, which returns the number of utterances, for each task whose file is missing.

        Raises `UserError` where a process dies.
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
            pool = ProcessPoolExecutor(count, get_context("spawn"), _initialise, (self.source, count))
            try:
                for size in in_order(pool, partial(_in_process, function), missing, 2 * count):
                    advance(size)
            except BrokenProcessPool as error:
                raise UserError(
                    f"a process died while {what}, perhaps for want of memory: finished shards are kept, run again with fewer --workers"
                ) from error
            except KeyboardInterrupt:  # shards that are not finished are made again
                for process in active_children():
                    process.terminate()
                raise
            finally:
                pool.shutdown(cancel_futures=True)


_opened: Extractor | None = None  # of a worker process
_processes = 1


def _initialise(source: FeatureSource, processes: int) -> None:
    global _opened, _processes
    Thread(target=_end_with_parent, daemon=True).start()
    _opened, _processes = source.open(), processes


def _end_with_parent() -> None:
    """A process whose parent was killed would wait for work for ever."""
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
    """A fair share of torch's threads; one for features so small that threads only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // processes) if extractor.heavy else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
