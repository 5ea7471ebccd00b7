"""Attention products of packed bits, form by form what quant/attention.py computes with +-1 in floats, in the same chunks and order.

Scores leave the kernel as float32 (or bfloat16), softmax is torch's, and probabilities are packed as they are compared; values are
packed along time. They run in eval mode: dropout is not applied.
"""

# B batch, T frames, H heads, d head dim, e position head dim, n queries of a chunk, G summaries

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...layers.bits import counted_as
from ...layers.sparse_pattern import SparsePattern, chunks, gather_summaries, split_blocks
from ...layers.tracing import follows_shapes
from ..attention import CHUNK, Probabilities, chunk, offsets_cost
from ..modules import Quantizer
from . import ops
from .modules import PackedCodes, PackedQuantizer

Rows = tuple[Tensor, Callable[[Callable[[slice], Tensor]], Tensor], "Tensor | None", int]  # scores, product, keys seen, their number


def _times(a: PackedCodes, b: Tensor, scale: Tensor) -> Tensor:
    """a (..., n, W) times the transpose of rows b (..., T, W), times scale: (..., n, T)."""
    panels = ops.panels_from(b)
    return ops.product(a.bits, panels, b.size(-2), a.inputs, True, scale, None, None, a.half)


def _part(codes: PackedCodes, start: int, stop: int) -> PackedCodes:
    return codes.part(codes.bits[:, :, start:stop])


@counted_as("attention", lambda q, table, *_: offsets_cost(q.bits.shape[:2].numel(), q.bits.size(2), table, q.inputs))
def _offsets(queries: PackedCodes, table: Tensor, start: int, scale: Tensor) -> Tensor:
    """`quant.attention.at_keys` times scale: table (H, 2T - 1, W)."""
    batch, heads, n, _ = queries.bits.shape
    frames = (table.size(1) + 1) // 2
    first, span = frames - start - n, frames + n - 1
    near = table[:, first : first + span].expand(batch, heads, span, -1)
    by_offset = _times(queries, near, scale).contiguous()
    return by_offset.as_strided((batch, heads, n, frames), (heads * n * span, n * span, span - 1, 1), n - 1)


class PackedProbabilities(nn.Module):
    """`Probabilities` as bits."""

    def __init__(self, source: Probabilities) -> None:
        super().__init__()
        self.quantizer = PackedQuantizer(source.quantizer)

    def forward(self, scores: Tensor, seen: Tensor | None, visible: Tensor | int) -> Callable[[slice], Tensor]:
        """As `Probabilities`; returned is a function that packs a range of the keys. `scores` are overwritten."""
        if seen is not None:  # added, which is faster than masked_fill: a score is nothing beside this number
            unseen = torch.finfo(scores.dtype).min / 2
            scores.add_(torch.zeros(seen.shape, dtype=scores.dtype, device=scores.device).masked_fill_(~seen, unseen))
        probs = torch.softmax(scores, -1, out=scores)
        factor = torch.as_tensor(visible, dtype=torch.float32, device=scores.device)
        factor = factor if factor.dim() else factor.view(1)
        return lambda keys: ops.pack(probs[..., keys], None, factor, self.quantizer.limit)


class _Packed(nn.Module):
    """What all forms share: the quantisers of the binary module, by their names."""

    operand_bits = (1, 1)
    probabilities: PackedProbabilities

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        for name, child in source.named_children():
            if isinstance(child, Quantizer):
                self.add_module(name, PackedQuantizer(child))
            elif isinstance(child, Probabilities):
                self.add_module(name, PackedProbabilities(child))


def _codes(x: Tensor | PackedCodes, quantizer: PackedQuantizer) -> PackedCodes:
    return quantizer(x) if isinstance(x, Tensor) else x


class PackedAttention(_Packed):
    """`BinaryAttention`; its queries and keys may come as codes."""

    query: PackedQuantizer
    key: PackedQuantizer
    value: PackedQuantizer

    @counted_as("attention")
    def forward(self, q: Tensor | PackedCodes, k: Tensor | PackedCodes, v: Tensor, attend: Tensor | None, dropout: float) -> Tensor:
        """As `BinaryAttention`."""
        query, key = _codes(q, self.query), _codes(k, self.key)
        scale: Tensor = query.scale * key.scale * v.size(-1) ** -0.5
        panels = ops.panels_from(key.bits)

        def scores(start: int, stop: int) -> Tensor:
            rows = query.bits[:, :, start:stop]
            return ops.product(rows, panels, v.size(2), v.size(-1), True, scale, None, None, query.half)

        return self._mixed(scores, v, attend)

    def _mixed(self, scores: Callable[[int, int], Tensor], v: Tensor, attend: Tensor | None) -> Tensor:
        frames, width, half = v.size(2), v.size(-1), v.dtype == torch.bfloat16
        values = self.value.columns(v)
        visible = frames if attend is None else attend.sum(-1, keepdim=True)
        mixed = []
        step = chunk(v)
        for start in range(0, frames, step):
            codes = self.probabilities(scores(start, min(start + step, frames)), attend, visible)
            mixed.append(ops.product(codes(slice(None)), values, width, frames, False, None, None, None, False))
        y = torch.cat(mixed, 2) * (self.probabilities.quantizer.scale * self.value.scale / visible)
        return y.bfloat16() if half else y


class PackedRelativeAttention(PackedAttention):
    """`BinaryRelativeAttention`."""

    content: PackedQuantizer
    position: PackedQuantizer
    offset: PackedQuantizer

    @counted_as("attention")
    def forward(  # type: ignore[override]
        self, content: Tensor, position: Tensor, k: Tensor, r: Tensor, v: Tensor, attend: Tensor | None, dropout: float
    ) -> Tensor:
        """As `BinaryRelativeAttention`."""
        contents, positions, key, width = self.content(content), self.position(position), self.key(k), k.size(-1) ** -0.5
        offset = self.offset(r)
        scale: Tensor = contents.scale * key.scale * width
        position_scale: Tensor = positions.scale * offset.scale * width
        panels = ops.panels_from(key.bits)

        def scores(start: int, stop: int) -> Tensor:
            rows = contents.bits[:, :, start:stop]
            sums = ops.product(rows, panels, k.size(2), k.size(-1), True, scale, None, None, contents.half)
            return sums.add_(_offsets(_part(positions, start, stop), offset.bits, start, position_scale))

        return self._mixed(scores, v, attend)


class PackedSparseAttention(PackedAttention):
    """`BinarySparseAttention`."""

    @counted_as("attention")
    def forward(  # type: ignore[override]
        self, q: Tensor | PackedCodes, k: Tensor | PackedCodes, v: Tensor, attend: Tensor | None, dropout: float, pattern: SparsePattern
    ) -> Tensor:
        """As `BinarySparseAttention`."""
        query, key = _codes(q, self.query), _codes(k, self.key)
        moved = v if self.value.move is None else v + self.value.move
        scale = query.scale * key.scale * v.size(-1) ** -0.5
        rows = self._banded if pattern.kind == "local" else self._blocked
        mixed = []
        for scores, product, seen, keys in rows(query, key.bits, moved, attend, scale, pattern):
            visible = keys if seen is None else seen.sum(-1, keepdim=True).clamp(min=1)
            sums = product(self.probabilities(scores, seen, visible))
            mixed.append(sums * (self.probabilities.quantizer.scale * self.value.scale / visible))
        y = torch.cat(mixed, 2)
        return y.bfloat16() if query.half else y

    @staticmethod
    def _blocked(q: PackedCodes, k: Tensor, v: Tensor, attend: Tensor | None, scale: Tensor, pattern: SparsePattern) -> Iterator[Rows]:
        width = v.size(-1)
        segments = pattern.segments(v.size(2))
        keys, summaries = gather_summaries(k, segments), gather_summaries(v, segments)  # (B, H, G, W), (B, H, G, d)
        values, far = ops.pack_columns(summaries), summaries.size(2)
        column = None if attend is None else attend.mT  # (B, 1, T, 1)
        far_seen = None if column is None else gather_summaries(column, segments).mT  # (B, 1, 1, G)
        for s in segments if follows_shapes(v) else chunks(segments):
            ours = q.part(q.bits[:, :, s.place])  # (B, H, n L, W)
            blocks = q.part(split_blocks(ours.bits, s.count))
            near = _times(blocks, s.blocks(k)[:, :, :, : s.own], scale).flatten(2, 3)  # (B, H, n L, own)
            scores = torch.cat((near, _times(ours, keys, scale)), -1)
            seen = None
            if column is not None and far_seen is not None:
                near_seen = s.blocks(column)[:, :, :, : s.own].mT.expand(-1, -1, -1, s.length, -1).flatten(2, 3)
                seen = torch.cat((near_seen, far_seen.expand(-1, -1, ours.bits.size(2), -1)), -1)
            own = ops.pack_columns(s.blocks(v)[:, :, :, : s.own])

            def product(codes: Callable[[slice], Tensor], s: Any = s, own: Tensor = own) -> Tensor:
                rows = split_blocks(codes(slice(0, s.own)), s.count)
                sums = ops.product(rows, own, width, s.own, False).flatten(2, 3)
                return sums.add_(ops.product(codes(slice(s.own, None)), values, width, far, False))

            yield scores, product, seen, scores.size(-1)

    @staticmethod
    def _banded(q: PackedCodes, k: Tensor, v: Tensor, attend: Tensor | None, scale: Tensor, pattern: SparsePattern) -> Iterator[Rows]:
        frames, window, width = v.size(2), pattern.window, v.size(-1)
        place = torch.arange(frames, device=v.device)
        for start in range(0, frames, CHUNK):
            stop = min(start + CHUNK, frames)
            near = slice(max(0, start - window), min(frames, stop + window))
            seen = ((place[start:stop, None] - place[near]).abs() <= window)[None, None]  # (1, 1, n, keys)
            if attend is not None:
                seen = seen & attend[..., near]
            values = ops.pack_columns(v[:, :, near])

            def product(codes: Callable[[slice], Tensor], values: Tensor = values, near: slice = near) -> Tensor:
                return ops.product(codes(slice(None)), values, width, near.stop - near.start, False)

            yield _times(_part(q, start, stop), k[:, :, near], scale), product, seen, 0


class PackedWeights(_Packed):
    """`BinaryWeights`."""

    query: PackedQuantizer
    key: PackedQuantizer
    position: PackedQuantizer
    offset: PackedQuantizer

    @counted_as("attention")
    def forward(self, q: Tensor, k: Tensor, p: Tensor, offsets: Tensor, seen: Tensor | None, dropout: float) -> PackedSharedProbabilities:
        """As `BinaryWeights`."""
        frames = q.size(2)
        query, key, position, offset = self.query(q), self.key(k), self.position(p), self.offset(offsets)
        scale, position_scale = query.scale * key.scale, position.scale * offset.scale
        attend = None if seen is None else seen[:, None, None]
        visible = frames if attend is None else attend.sum(-1, keepdim=True).clamp(min=1)
        panels = ops.panels_from(key.bits)
        parts = []
        step = chunk(q)
        for start in range(0, frames, step):
            rows = _part(query, start, min(start + step, frames))
            sums = ops.product(rows.bits, panels, frames, q.size(-1), True, scale, None, None, query.half)
            sums.add_(_offsets(_part(position, start, start + rows.bits.size(2)), offset.bits, start, position_scale))
            parts.append(self.probabilities(sums, attend, visible)(slice(None)))
        return PackedSharedProbabilities(torch.cat(parts, 2), frames, self.probabilities.quantizer.scale / visible)


class PackedSharedProbabilities:
    """`SharedProbabilities` as bits (B, H, T, W): few enough to be kept whatever the length."""

    def __init__(self, bits: Tensor, frames: int, scale: Tensor) -> None:
        self.bits, self.frames, self.scale = bits, frames, scale

    def mix(self, columns: Tensor, width: int, scale: Tensor) -> Tensor:
        """Values, packed along time, of all heads or of the first one, with `width` channels."""
        sums = ops.product(self.bits[:, : columns.size(1)], columns, width, self.frames, False)
        return sums * (self.scale * scale)


class PackedMix(_Packed):
    """`BinaryMix`."""

    value: PackedQuantizer

    @counted_as("attention")
    def forward(self, values: Tensor, weights: PackedSharedProbabilities) -> Tensor:
        """As `BinaryMix`."""
        y = weights.mix(self.value.columns(values), values.size(-1), self.value.scale)
        return y.bfloat16() if values.dtype == torch.bfloat16 else y
