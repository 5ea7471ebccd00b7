"""How a run ends early: one line for bad input (exit 2) or a number that is not finite (exit 1), a checkpoint on SIGTERM (143)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from fairseq.distributed import utils as distributed_utils

from hubert_eff.errors import UserError

SIGTERM_EXIT = 128 + signal.SIGTERM


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
    """In a training run turn a `UserError` into its one line and exit code 2. Also usable as a decorator."""
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
    """Leaves a validation in which a stop was asked for."""


_requested = False


def _request(_signal: int, _frame: Any) -> None:
    global _requested
    _requested = True


def listen() -> None:
    """From now on SIGTERM only asks for a stop; the training loop then saves and leaves between two updates.

    A worker of fairseq's multi-GPU spawn sees the death of its parent as SIGINT, so there SIGINT asks for a stop as well.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _request)
        # data loading workers are ended by SIGTERM: with this handler inherited they would stay, and the exit wait for them for ever
        os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))
        if multiprocessing.parent_process() is not None:
            signal.signal(signal.SIGINT, _request)


def requested() -> bool:
    """Whether a stop was asked for on any rank. All ranks call this at the same points, or none does."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return _requested
    group = distributed_utils.get_data_parallel_group()
    flag = torch.tensor([float(_requested)], device="cuda" if dist.get_backend(group) == "nccl" else "cpu")
    distributed_utils.all_reduce(flag, group=group, op="max")
    return bool(flag.item())
