"""The scripts of benchmarks/, imported as they import each other."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .paths import ROOT


@contextmanager
def scripts(folder: str, *names: str) -> Iterator[list[Any]]:
    """Modules of benchmarks/`folder` by name; what they import from there is forgotten afterwards."""
    place = ROOT / "benchmarks" / folder
    sys.path.insert(0, str(place))
    try:
        yield [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(place))
        for file in place.glob("*.py"):
            sys.modules.pop(file.stem, None)
