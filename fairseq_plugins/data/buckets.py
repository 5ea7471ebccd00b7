"""Lengths of batches: with few of them a compiler makes its kernels once, and a GPU's allocator reuses its blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hubert_eff.config import FRAME_STRIDE
from hubert_eff.errors import UserError

FRAMES = 8  # every length gives a multiple of so many frames, which suits tensor cores


class Buckets:
    """N lengths in samples at the quantiles of the utterances' own, each of 8 k frames: 320 (8 k + 1) samples.

    An utterance belongs to the longest length that it fills (`padded=False`), or to the shortest that holds it.
    """

    def __init__(self, sizes: Sequence[int], count: int, longest: int, padded: bool) -> None:
        self.padded, self.longest = padded, longest
        limit = self._round(longest, up=False)
        clipped = np.minimum(sizes, limit)
        share = np.arange(1, count + 1) / count if padded else np.arange(count) / count
        edges = np.quantile(clipped, share, method="lower")
        self.lengths = np.unique([min(self._round(int(edge), up=padded), limit) for edge in edges])
        if self.lengths[0] < self._round(0, up=True):
            raise UserError(
                f"task.length_buckets={count}: the shortest utterance has {min(sizes)} samples, and no batch is shorter than "
                f"{self._round(0, up=True)}: leave such out with task.min_sample_size"
            )

    @staticmethod
    def _round(samples: int, up: bool) -> int:
        step = FRAMES * FRAME_STRIDE
        whole = samples - FRAME_STRIDE
        return FRAME_STRIDE + step * (max(1, -(-whole // step)) if up else whole // step)

    def length(self, samples: int) -> int:
        """The length of the bucket that `samples` samples belong to; those beyond the last are cut to it."""
        place = int(np.searchsorted(self.lengths, samples, side="left" if self.padded else "right")) - (not self.padded)
        return int(self.lengths[min(max(place, 0), len(self.lengths) - 1)])

    def kept(self, sizes: Sequence[int]) -> float:
        """Share of the audio that is used, out of what `longest` leaves; above 1 if padding is added."""
        used = sum(map(self.length, sizes))
        return used / max(1, int(np.minimum(sizes, self.longest).sum()))
