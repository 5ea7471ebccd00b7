"""Figures that every criterion logs beside its losses: the speed in seconds of audio, and memory."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch
from fairseq.logging import metrics
from torch import Tensor

from hubert_eff.config import SAMPLE_RATE


def audio_seconds(sample: dict[str, Any]) -> Tensor:
    """Seconds of audio in a batch, without padding; on its device, so that nothing waits for it."""
    inputs = sample["net_input"]
    padding = inputs.get("padding_mask")
    samples = (~padding).sum() if padding is not None else torch.tensor(inputs["source"].numel(), device=inputs["source"].device)
    return samples / SAMPLE_RATE


def memory_gb() -> float:
    """Peak memory of this process so far in 10^9 bytes: that of its GPU if there is one, otherwise resident memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def log_throughput(seconds: float) -> None:
    """Log `audio_per_s`, seconds of audio per second over all ranks, and `mem_gb` of the first rank."""
    metrics.log_speed("audio_per_s", seconds, priority=90, round=1)
    metrics.log_scalar("mem_gb", memory_gb(), weight=0, priority=95, round=2)
