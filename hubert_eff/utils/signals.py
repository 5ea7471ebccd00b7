"""Stops a command on a signal: it ends with one line, and unfinished files are removed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
STEP = "HUBERT_EFF_STEP"  # set in the environment of commands that another command runs, which reports the stop itself
_held = 0  # number of running sections that must not be interrupted
_waiting = False  # whether to stop at their end


@contextmanager
def stoppable() -> Iterator[list[int]]:
    """Raise `KeyboardInterrupt` on the first SIGINT or SIGTERM, so that files and processes are cleaned up; yields the signals so far.

    The same signal once more ends the process at once. Signals that are ignored, or that others handle, are left as they are.
    """
    received: list[int] = []
    process = os.getpid()

    def stop(number: int, _: FrameType | None) -> None:
        global _waiting
        if number in received or os.getpid() != process:  # a forked process ends as usual
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        received.append(number)
        if _held:
            _waiting = True
        elif len(received) == 1:
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in WORDS}
    ours = [number for number, handler in before.items() if handler in (signal.SIG_DFL, signal.default_int_handler)]
    try:
        for number in ours:
            signal.signal(number, stop)
    except ValueError:  # only the main thread has signals
        ours = []
    try:
        yield received
    finally:
        for number in ours:  # a stopped process need not wait for running work
            signal.signal(number, signal.SIG_DFL if received else before[number])


@contextmanager
def held() -> Iterator[None]:
    """Delay the effect of `stoppable` to the end, for calls into C that call back, where Python drops exceptions."""
    global _held, _waiting
    _held += 1
    try:
        yield
    finally:
        _held -= 1
        if _waiting and not _held:
            _waiting = False
            raise KeyboardInterrupt


def say_stopped(program: str, received: list[int], more: str = "") -> int:
    """Print one line that a program was stopped, and what more the user should know; returns its exit code."""
    number = received[0] if received else signal.SIGINT
    if STEP not in os.environ:
        print(f"{program}: {WORDS[signal.Signals(number)]}{more and '; '}{more}", file=sys.stderr)
    return 128 + number
