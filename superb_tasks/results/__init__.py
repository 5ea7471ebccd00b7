"""Scores of tasks, their tables, significance, and the folder to submit."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Names that this module had when it was a file."""
    if name not in ("cells", "collect", "report"):
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from . import tables

    return getattr(tables, name)
