"""Streaming: hidden states while audio comes, equal to those of a full pass under the chunks' masks."""

from .stream import StreamingModel

__all__ = ["StreamingModel"]
