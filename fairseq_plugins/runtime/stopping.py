"""Ends a run: with one line for bad input (exit 2) or a number that is not finite (exit 1), saved on SIGTERM (143) or SIGINT (130)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from fairseq.distributed import utils as distributed_utils

from hubert_eff.errors import UserError


def in_training_run() -> bool:
    """Whether this process was started by `fairseq-hydra-train`, as opposed to Python code that uses the plug-in."""
    return "fairseq_cli.train" in sys.modules


def end_run(message: str, code: int) -> NoReturn:
    """Print one line and leave. SystemExit, because hydra prints a traceback for any Exception and then exits with 1."""
    sys.stdout.flush()
    print(f"fairseq-hydra-train: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """In a training run, turn a `UserError` into one line and exit code 2. Also usable as a decorator."""
    try:
        yield
    except UserError as error:
        if not in_training_run():
            raise
        end_run(str(error), 2)


def not_finite(message: str) -> NoReturn:
    """End a training run whose loss or gradient is not finite; `FloatingPointError` elsewhere.

    The weights are those before the update, and no checkpoint is written: the last one on disk stays the last one.
    """
    if not in_training_run():
        raise FloatingPointError(message)
    end_run(message, 1)


class StopRequested(BaseException):
    """Leaves a validation after a request to stop."""


AGAIN = 0.2  # seconds after a SIGINT from which another is a second one: launchers pass on what the terminal has sent to all
_requested = 0  # the signal that requested a stop
_requested_at = 0.0
_training = False  # whether the loop that handles a stop is running


def _request(number: int, _frame: Any) -> None:
    global _requested, _requested_at
    # a worker of fairseq's multi-GPU spawn sees the death of its parent as SIGINT
    spawned = multiprocessing.parent_process() is not None and dist.is_initialized()
    if number == signal.SIGINT and not _training and not _requested:
        _requested = number
        if not spawned:
            _say("interrupted before the first update: nothing new is saved, and what was saved before is intact")
        raise SystemExit(128 + number)
    if number == signal.SIGINT and not spawned:
        if not _training or (_requested == number and time.monotonic() - _requested_at > AGAIN):
            _say("interrupted twice: left at once. What was saved before is intact")
            os._exit(128 + number)
        if _requested != number:
            _say("interrupted: the run saves the current update and ends. Interrupt again to leave at once")
            _requested_at = time.monotonic()
    _requested = max(_requested, number)


def _say(message: str) -> None:
    """Print one line, even from a signal handler that interrupted `print`."""
    os.write(2, f"fairseq-hydra-train: {message}\n".encode())


def leave_on_interrupt() -> None:
    """Make SIGINT end the run in one line from now on; once it trains, `listen` saves it.

    The workers that load data leave SIGINT to this process: a terminal sends it to all, and they are still needed.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, _request)


def _leave_to_parent() -> None:
    if signal.getsignal(signal.SIGINT) is _request:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    # data loading workers are ended by SIGTERM: with this handler inherited they would stay, and the exit wait for them for ever
    if signal.getsignal(signal.SIGTERM) is _request:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_leave_to_parent)


def listen() -> None:
    """From now on SIGTERM only asks for a stop, and so does SIGINT; the training loop then saves and leaves between two updates."""
    global _training
    if not _training and threading.current_thread() is threading.main_thread():
        _training = True
        signal.signal(signal.SIGTERM, _request)
        if not in_training_run() and multiprocessing.parent_process() is not None:
            leave_on_interrupt()


def requested() -> int:
    """The signal that requested a stop on any rank, or 0. All ranks call this at the same points, or none does."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return _requested
    group = distributed_utils.get_data_parallel_group()
    flag = torch.tensor([float(_requested)], device="cuda" if dist.get_backend(group) == "nccl" else "cpu")
    distributed_utils.all_reduce(flag, group=group, op="max")
    return int(flag.item())
