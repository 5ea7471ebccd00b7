"""Patterns of sparse attention: which frames a frame sees, and their blocks.

fixed (Child et al. 2019, section 4.2, without its causal mask): frame i sees its own block of l frames, and the last c frames of every
block. The keys form two disjoint parts: those that only one block sees, and the summaries that all frames see.
"""

# B batch, T frames, H heads, d head dim, l stride, c expressivity, n blocks, L frames of a block, G summaries, W window

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 512  # queries of a piece, and so the number of rows of scores in memory


@dataclass(frozen=True)
class Segment:
    """`count` consecutive blocks of `length` frames from frame `start` on; all but the first `own` frames of each are summaries."""

    start: int
    count: int
    length: int
    own: int

    @property
    def place(self) -> slice:
        """The frames of this segment."""
        return slice(self.start, self.start + self.count * self.length)

    def blocks(self, x: Tensor) -> Tensor:
        """This segment of x (B, H, T, d) as a view (B, H, n, L, d)."""
        return split_blocks(x[:, :, self.place], self.count)


@dataclass(frozen=True)
class SparsePattern:
    """The keys that a query sees, in frames.

    fixed: {j: j // l = i // l} and {j: j mod l >= l - c}. fairseq: as fairseq's SparseMultiheadAttention describes it, that is, `fixed`
    with c + 1 summaries on the frames 1, 2, ..., and frame 0 before their first block. local: {j: |i - j| <= W}.
    """

    kind: str
    stride: int
    expressivity: int
    window: int

    def segments(self, frames: int) -> list[Segment]:
        """The blocks of `frames` frames; the last one may be shorter."""
        length, summaries, start, segments = self.stride, self.expressivity, 0, []
        if self.kind == "fairseq":
            start, own = min(length + 1, frames), min(length - summaries, frames)
            segments.append(Segment(0, 1, start, own))
            summaries += 1
        count, rest = divmod(frames - start, length)
        if count:
            segments.append(Segment(start, count, length, length - summaries))
        if rest:
            segments.append(Segment(frames - rest, 1, rest, min(rest, length - summaries)))
        return segments

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Which of the keys, frame numbers (T',), each of the queries (T,) sees: (T, T') bool."""
        i, j = queries.unsqueeze(1), keys.unsqueeze(0)
        if self.kind == "local":
            return (i - j).abs() <= self.window
        first, summaries = 0, self.expressivity
        if self.kind == "fairseq":
            i, j, first, summaries = (i - 1).clamp(min=0), j - 1, -1, summaries + 1
        block = torch.div(j.clamp(min=0), self.stride, rounding_mode="floor")
        shared = (j % self.stride >= self.stride - summaries) & (j > first)
        return shared | (torch.div(i, self.stride, rounding_mode="floor") == block)

    def visible(self, frames: Tensor) -> Tensor:
        """The approximate number of keys that a query sees in inputs of `frames` frames, ignoring shorter blocks and the ends."""
        if self.kind == "local":
            return frames.clamp(max=2 * self.window + 1)
        return self.stride + self.expressivity * (frames / self.stride - 1).clamp(min=0.0)


def split_blocks(x: Tensor, count: int) -> Tensor:
    """(B, H, n L, d) -> (B, H, n, L, d)."""
    return torch.unflatten(x, 2, (count, -1))


def gather_summaries(x: Tensor, segments: list[Segment]) -> Tensor:
    """Gather the summaries among the frames of x, (B, H, G, d)."""
    return torch.cat([s.blocks(x)[:, :, :, s.own :].flatten(2, 3) for s in segments], 2)


def put_summaries(whole: Tensor, summaries: Tensor, segments: list[Segment]) -> None:
    """Do the inverse of `gather_summaries`, into `whole` (B, H, T, d)."""
    begin = 0
    for s in segments:
        end = begin + s.count * (s.length - s.own)
        if end > begin:
            s.blocks(whole)[:, :, :, s.own :] = split_blocks(summaries[:, :, begin:end], s.count)
        begin = end


def chunks(segments: list[Segment]) -> list[Segment]:
    """The segments in pieces of about `ROWS` queries."""
    pieces = []
    for s in segments:
        group = max(1, ROWS // s.length)
        for first in range(0, s.count, group):
            pieces.append(Segment(s.start + first * s.length, min(group, s.count - first), s.length, s.own))
    return pieces
