"""Numbers on the command line: `type=whole(COUNT)` beside an option's default refuses what is out of bounds before the command begins."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import TypeVar

from ..config import Bounds

N = TypeVar("N", int, float)


def whole(bounds: Bounds) -> Callable[[str], int]:
    """An argparse type: a whole number within bounds."""
    return lambda text: _read(text, int, "a whole number", bounds)


def real(bounds: Bounds) -> Callable[[str], float]:
    """An argparse type: a number within bounds, never NaN."""
    return lambda text: _read(text, float, "a number", bounds)


def _read(text: str, kind: type[N], name: str, bounds: Bounds) -> N:
    try:
        value = kind(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not {name}") from error
    if not bounds.holds(value):
        raise ArgumentTypeError(f"{text} must be {bounds}")
    return value
