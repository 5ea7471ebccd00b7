"""Streaming: hidden states while audio comes, equal to those of the masked full pass."""

from .stream import StreamingModel

__all__ = ["StreamingModel"]
