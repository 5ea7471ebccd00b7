"""Span masks (wav2vec 2.0, section 3.1; HuBERT, section II-C) and those of SpecAugment, seeded per utterance."""

# B batch, T frames

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def span_mask(
    length: int,
    prob: float,
    span: int,
    rng: np.random.Generator,
    selection: str = "static",
    other: float = 0.0,
    min_spans: int = 0,
) -> np.ndarray:
    """Draw a mask (length,) bool of about `prob * length / span` spans at distinct starts; spans may overlap.

    The number is rounded up or down at random so that its mean is exact. `selection` is the distribution of span lengths: `span` (static),
    uniform in [other, 2 * span], or with mean `span` normal with deviation `other` or Poisson.
    """
    mask = np.zeros(length, dtype=bool)
    if length == 0 or prob <= 0:
        return mask
    count = max(min_spans, int(prob * length / span + rng.random()))
    count = min(count, length)
    if selection == "uniform":
        spans = rng.integers(int(other), 2 * span + 1, count)
    elif selection == "normal":
        spans = np.rint(rng.normal(span, other, count)).astype(int)
    elif selection == "poisson":
        spans = rng.poisson(span, count)
    else:
        spans = np.full(count, span)
    spans = np.maximum(spans, 1)
    shortest = int(spans.min(initial=length))
    starts = rng.choice(max(length - shortest + 1, count), count, replace=False)
    for start, size in zip(starts, spans, strict=True):
        mask[start : start + size] = True
    return mask


def batch_mask(
    lengths: Sequence[int],
    size: int,
    seeds: Sequence[Sequence[int]],
    prob: float,
    span: int,
    selection: str,
    other: float,
    min_spans: int = 0,
) -> Tensor:
    """Draw a mask (B, size) bool: row i covers its first `lengths[i]` places, by a generator seeded with `seeds[i]`."""
    mask = np.zeros((len(lengths), size), dtype=bool)
    for row, (length, seed) in enumerate(zip(lengths, seeds, strict=True)):
        mask[row, :length] = span_mask(length, prob, span, np.random.default_rng(seed), selection, other, min_spans)
    return torch.from_numpy(mask)


def uniform_mask(size: int, count: int, widest: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a mask (size,) bool of `count` spans with widths from 0 to `widest` at places where they fit (Park et al. 2019, section 2: f
    from [0, F], f0 from [0, v - f))."""
    mask = np.zeros(size, dtype=bool)
    for _ in range(count):
        width = min(int(rng.integers(widest + 1)), size)
        start = int(rng.integers(size - width + 1))
        mask[start : start + width] = True
    return mask
