"""Sparse attention by torch's FlexAttention, which skips tiles of keys that no query of a tile sees."""

# B batch, T frames, H heads, d head dim

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .sparse_pattern import SparsePattern, gather_summaries

try:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention
except ImportError:  # torch < 2.5
    flex_attention = None  # type: ignore[assignment]

TILE = 128  # queries and keys of a block in FlexAttention's block mask


@lru_cache(maxsize=16)
def tiles(pattern: SparsePattern, frames: int, device: torch.device) -> tuple[Tensor, BlockMask]:
    """Make the order of the keys for FlexAttention (T,), and the mask of `frames` frames padded to whole tiles.

    Summaries come first: in order of time nearly every tile would hold one, and no tile could be skipped. A key is visible if it is a
    summary or within `reach` of the query, counted in blocks, or in frames with the local pattern.
    """
    size = -(-frames // TILE) * TILE
    place = torch.arange(frames, device=device)
    if pattern.kind == "local":
        order, query_at, key_at, summaries, reach = place, place, place, 0, pattern.window
    else:
        segments, grid = pattern.segments(frames), place.view(1, 1, -1, 1)
        first = [gather_summaries(grid, segments).flatten()]
        order = torch.cat(first + [s.blocks(grid)[:, :, :, : s.own].flatten() for s in segments])
        starts = torch.tensor([s.start + n * s.length for s in segments for n in range(s.count)], device=device)
        query_at = torch.searchsorted(starts, place, right=True)  # index of the block
        key_at, summaries, reach = query_at[order], first[0].numel(), 0
    shared = torch.arange(size, device=device) < summaries
    query_at = F.pad(query_at, (0, size - frames), value=int(query_at[-1]))
    nowhere = -2 * size  # farther than any reach
    key_at = F.pad(key_at, (0, size - frames), value=nowhere).masked_fill(shared, nowhere)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return shared[j] | ((query_at[i] - key_at[j]).abs() <= reach)

    queries, keys = query_at.view(-1, TILE), key_at.view(-1, TILE)
    real = keys != nowhere
    low, high = keys.masked_fill(~real, 2 * size).amin(1), keys.amax(1)
    table = (low - reach <= queries.amax(1, True)) & (high + reach >= queries.amin(1, True)) | shared.view(-1, TILE).any(1)
    indices = table.int().argsort(dim=1, descending=True, stable=True)
    return order, BlockMask.from_kv_blocks(table.sum(1)[None, None].int(), indices[None, None].int(), BLOCK_SIZE=TILE, mask_mod=visible)


def sparse_flex(q: Tensor, k: Tensor, v: Tensor, attend: Tensor | None, pattern: SparsePattern, kernel: Callable[..., Any]) -> Tensor:
    """Sparse attention of q, k, v (B, H, T, d) through `kernel`, which is `flex_attention`, compiled; `attend` (B, 1, 1, T) bool."""
    frames = q.size(2)
    order, mask = tiles(pattern, frames, q.device)
    behind = -frames % TILE
    q, k, v = (F.pad(x, (0, 0, 0, behind)) for x in (q, k.index_select(2, order), v.index_select(2, order)))
    score = None
    if attend is not None:
        seen = F.pad(attend[:, 0, 0].index_select(1, order), (0, behind), value=True)  # (B, T)
        never = torch.finfo(q.dtype).min / 2

        def score(value: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.where(seen[b, j], value, never)

    mixed: Tensor = kernel(q, k, v, score_mod=score, block_mask=mask)
    return mixed[:, :, :frames]


@lru_cache(maxsize=1)
def compiled_flex() -> Callable[..., Tensor] | None:
    """`sparse_flex` around the compiled kernel. A compiled block calls it uncompiled, so that its mask is kept between calls.

    None if torch has no FlexAttention.
    """
    if flex_attention is None:
        return None
    kernel = torch.compile(flex_attention)

    def run(q: Tensor, k: Tensor, v: Tensor, attend: Tensor | None, pattern: SparsePattern) -> Tensor:
        return sparse_flex(q, k, v, attend, pattern, kernel)

    return torch.compiler.disable(run)  # type: ignore[no-any-return,no-untyped-call]


def takes_flex(q: Tensor) -> bool:
    """Whether FlexAttention takes such queries: on a GPU, with a width that is a power of two, at least 16."""
    width = q.size(-1)
    return q.is_cuda and q.numel() > 0 and width >= 16 and width & (width - 1) == 0
