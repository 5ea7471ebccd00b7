"""Hidden states of recordings."""

from .extraction import extract

__all__ = ["extract"]
