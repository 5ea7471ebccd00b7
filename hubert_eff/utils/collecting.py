"""When Python looks for garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Have Python not look for unreachable objects meanwhile.

    A model is thousands of objects, none of which is garbage. Making them would start a search through all objects of torch, a tenth of
    a second, which is a third of what the first load of a file takes.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
