"""Attention products of packed bits, for every form that quant/attention.py computes with +-1 in floats.

Kernels find the bits of the probabilities by integers (quant/integer_softmax.py), so neither scores nor probabilities are stored as
floats; values are packed along time, and a product of bits mixes them. They run in eval mode, without dropout.
"""

# B batch, T frames, H heads, d head dim, e position head dim, n queries of a piece, G summaries

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...layers.bits import counted_as
from ...layers.chunks import Chunks
from ...layers.sparse_pattern import SparsePattern, chunks, gather_summaries
from ...layers.tracing import follows_shapes
from ..attention import CHUNK, Probabilities
from ..integer_softmax import cost_of_bit
from ..modules import Quantizer
from . import ops
from .modules import PackedCodes, PackedQuantizer

BITS = 1 << 26  # bits of probabilities that are in memory at a time
KEPT = 1 << 29  # bits of shared probabilities that are kept; those of longer input are recomputed for each use

Rows = tuple[Tensor, Tensor, int, "Tensor | int"]  # bits of probabilities, packed values, their number, keys seen


def _pieces(v: Tensor, keys: int) -> Iterator[tuple[int, int]]:
    """Queries start ... stop - 1 of dense attention of v (B, H, T, d) to so many keys, whose probabilities exist at a time."""
    batch, heads, frames, _ = v.shape
    step = frames if follows_shapes(v) else max(1, BITS // (batch * heads * keys * CHUNK)) * CHUNK
    return ((start, min(start + step, frames)) for start in range(0, frames, step))


def _words(seen: Tensor | None) -> Tensor | None:
    """Bits of a mask (..., T)."""
    return None if seen is None else ops.pack(seen.float())


def _mask(attend: Tensor | None, batch: int) -> Tensor | None:
    """Bits of a mask (B or 1, 1, 1 or n, T) of the keys of each query: (B, 1, 1 or n, W)."""
    return None if attend is None else _words(attend.expand(batch, -1, -1, -1))


def _part(mask: Tensor | None, start: int, stop: int) -> Tensor | None:
    """Select the queries start ... stop - 1 of such bits, as operations expect: (B, W) if all see the same, otherwise (B, n, W)."""
    if mask is None:
        return None
    return mask[:, 0, 0] if mask.size(2) == 1 else mask[:, 0, start:stop]


def _with_kept(owner: nn.Module, chunks: Chunks | None, keys: Tensor) -> Tensor:
    """Put the rows of keys that a stream has kept in front of these, (B, H, n, W)."""
    return keys if chunks is None else chunks.with_kept(owner, keys)[0]


def _columns(quantizer: PackedQuantizer, chunks: Chunks | None, v: Tensor) -> Tensor:
    """Append values (B, H, n, d), packed along time, to those that a stream has kept."""
    panels = quantizer.columns(v)
    if chunks is not None and chunks.kept is not None:
        if quantizer in chunks.kept:
            (kept,), frames = chunks.kept[quantizer], chunks.keys_before
            panels = ops.join_columns(kept, frames, chunks.surplus(frames), panels, v.size(2))
        chunks.kept[quantizer] = (panels,)
    return panels


def _once(chunks: Chunks | None, owner: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """Make something once for all chunks of a stream."""
    return make() if chunks is None else chunks.table(owner, 0, make)


def _visible(attend: Tensor | None) -> Tensor | None:
    """Number of keys that a query sees; None for all."""
    return None if attend is None else attend.sum(-1, keepdim=True).clamp(min=1)


def _costs(*terms: tuple[Tensor, int]) -> Tensor:
    """The cost of a bit in each of the terms, from their scales and numbers of channels."""
    return torch.cat([cost_of_bit(scale, inputs) for scale, inputs in terms])


class _Packed(nn.Module):
    """The part that all forms share: the quantizers of the binary module, by name."""

    operand_bits = (1, 1)

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        for name, child in source.named_children():
            if isinstance(child, Quantizer):
                self.add_module(name, PackedQuantizer(child))
            elif isinstance(child, Probabilities):
                self.add_module(name, PackedQuantizer(child.quantizer))


def _codes(x: Tensor | PackedCodes, quantizer: PackedQuantizer) -> PackedCodes:
    return quantizer(x) if isinstance(x, Tensor) else x


class PackedAttention(_Packed):
    """`BinaryAttention`; its queries and keys may come as codes."""

    query: PackedQuantizer
    key: PackedQuantizer
    value: PackedQuantizer
    probabilities: PackedQuantizer

    @counted_as("attention")
    def forward(
        self, q: Tensor | PackedCodes, k: Tensor | PackedCodes, v: Tensor, attend: Tensor | None, dropout: float,
        chunks: Chunks | None = None,
    ) -> Tensor:  # fmt: skip
        """As `BinaryAttention`."""
        return self._dense(q, k, v, _mask(attend, len(v)), _visible(attend), chunks)

    def _dense(
        self, q: Tensor | PackedCodes, k: Tensor | PackedCodes, v: Tensor, seen: Tensor | None, visible: Tensor | None,
        chunks: Chunks | None,
    ) -> Tensor:  # fmt: skip
        """With a mask as bits, and the number of keys that it shows."""
        query, key, width = _codes(q, self.query), _codes(k, self.key), v.size(-1)
        rows = _with_kept(self, chunks, key.bits)
        frames = rows.size(2)
        cost = _once(chunks, (_costs, self), lambda: _costs((query.scale * key.scale * width**-0.5, width)))
        keys, threshold = ops.panels_from(rows), self.probabilities.scale / 2

        def attended(start: int, stop: int) -> Tensor:
            return ops.attention(query.bits[:, :, start:stop], keys, frames, width, cost, threshold, _part(seen, start, stop))

        return self._mixed(attended, v, frames, visible, chunks)

    def _mixed(
        self, attended: Callable[[int, int], Tensor], v: Tensor, frames: int, visible: Tensor | None, chunks: Chunks | None
    ) -> Tensor:
        """`attended(start, stop)`: bits (B, H, n, W) of the queries start ... stop - 1; `frames`: keys, of which `visible` are seen."""
        width, values = v.size(-1), _columns(self.value, chunks, v)
        scale = self.probabilities.scale * self.value.scale / (frames if visible is None else visible)
        one = scale.numel() == 1  # for all queries: the product's own
        own, half = (scale.view(1), v.dtype == torch.bfloat16) if one else (None, False)
        mixed = [ops.product(attended(*piece), values, width, frames, False, own, None, None, half) for piece in _pieces(v, frames)]
        y = mixed[0] if len(mixed) == 1 else torch.cat(mixed, 2)
        return y if one else y.mul_(scale).to(v.dtype)


class PackedRelativeAttention(PackedAttention):
    """`BinaryRelativeAttention`."""

    content: PackedQuantizer
    position: PackedQuantizer
    offset: PackedQuantizer

    @counted_as("attention")
    def forward(  # type: ignore[override]
        self, content: Tensor, position: Tensor, k: Tensor, r: Tensor, v: Tensor, attend: Tensor | None, dropout: float,
        chunks: Chunks | None = None,
    ) -> Tensor:  # fmt: skip
        """As `BinaryRelativeAttention`."""
        contents, positions, key, offset = self.content(content), self.position(position), self.key(k), self.offset(r)
        rows, width, root = _with_kept(self, chunks, key.bits), k.size(-1), k.size(-1) ** -0.5
        frames, behind = rows.size(2), rows.size(2) - k.size(2)  # keys, and those before the first query
        terms = (contents.scale * key.scale * root, width), (positions.scale * offset.scale * root, width)
        cost = _once(chunks, (_costs, self), lambda: _costs(*terms))
        keys, offsets = ops.panels_from(rows), ops.panels_from(offset.bits)
        seen, threshold = _mask(attend, len(v)), self.probabilities.scale / 2

        def attended(start: int, stop: int) -> Tensor:
            q, p, mask = contents.bits[:, :, start:stop], positions.bits[:, :, start:stop], _part(seen, start, stop)
            return ops.relative_attention(q, p, keys, offsets, frames, width, width, cost, threshold, mask, behind + start)

        return self._mixed(attended, v, frames, _visible(attend), chunks)


class PackedSparseAttention(PackedAttention):
    """`BinarySparseAttention`."""

    @counted_as("attention")
    def forward(  # type: ignore[override]
        self, q: Tensor | PackedCodes, k: Tensor | PackedCodes, v: Tensor, attend: Tensor | None, dropout: float, pattern: SparsePattern,
        chunks: Chunks | None = None,
    ) -> Tensor:  # fmt: skip
        """As `BinarySparseAttention`."""
        if chunks is not None:
            end = chunks.start + v.size(2)  # all blocks of a stream share what is made of the mask
            seen = chunks.table((_mask, pattern), end, lambda: _mask(attend, len(v)))
            return self._dense(q, k, v, seen, chunks.table((_visible, pattern), end, lambda: _visible(attend)), chunks)
        query, key = _codes(q, self.query), _codes(k, self.key)
        cost = _costs((query.scale * key.scale * v.size(-1) ** -0.5, v.size(-1)))
        rows = self._banded if pattern.kind == "local" else self._blocked
        mixed = []
        for bits, values, keys, visible in rows(query.bits, key.bits, v, attend, cost, pattern):
            scale = self.probabilities.scale * self.value.scale / visible
            own = scale if isinstance(visible, int) else None
            y = ops.product(bits, values, v.size(-1), keys, False, own)
            y = y.flatten(2, 3) if y.dim() == 5 else y
            mixed.append(y if own is not None else y.mul_(scale))
        y = torch.cat(mixed, 2)
        return y.bfloat16() if query.half else y

    def _blocked(self, q: Tensor, k: Tensor, v: Tensor, attend: Tensor | None, cost: Tensor, pattern: SparsePattern) -> Iterator[Rows]:
        width, threshold = v.size(-1), self.probabilities.scale / 2
        segments = pattern.segments(v.size(2))
        shared, values = ops.panels_from(gather_summaries(k, segments)), gather_summaries(v, segments)  # (B, H, .., W, 16), (B, H, G, d)
        far, columns = values.size(2), self.value.columns(values).unsqueeze(2)
        move = None if self.value.move is None else self.value.move.unsqueeze(1)
        column = None if attend is None else attend.mT  # (B, 1, T, 1)
        far_seen = None if column is None else gather_summaries(column, segments)[:, 0, :, 0]  # (B, G)
        for s in segments if follows_shapes(v) else chunks(segments):
            near_seen = None if column is None else s.blocks(column)[:, 0, :, : s.own, 0]  # (B, n, own)
            visible: Tensor | int = s.own + far
            if near_seen is not None and far_seen is not None:
                count = near_seen.sum(-1) + far_seen.sum(-1, keepdim=True)
                visible = count.clamp(min=1).repeat_interleave(s.length, 1)[:, None, :, None]  # (B, 1, n L, 1)
            own_keys, own_values = ops.panels_from(s.blocks(k)[:, :, :, : s.own]), ops.pack_columns(s.blocks(v)[:, :, :, : s.own], move)
            bits = ops.blocked_attention(
                s.blocks(q), own_keys, shared, s.own, far, width, cost, threshold, _words(near_seen), _words(far_seen)
            )  # (B, H, n, L, W)
            both = torch.cat((own_values, columns.expand(-1, -1, s.count, -1, -1, -1)), -2)  # in the order of the bits
            yield bits, both, s.own + far, visible

    def _banded(self, q: Tensor, k: Tensor, v: Tensor, attend: Tensor | None, cost: Tensor, pattern: SparsePattern) -> Iterator[Rows]:
        frames, window, width, threshold = v.size(2), pattern.window, v.size(-1), self.probabilities.scale / 2
        place = torch.arange(frames, device=v.device)
        left, right = (place - window).clamp(min=0), (place + window + 1).clamp(max=frames)
        visible = (right - left).view(1, 1, -1, 1)
        if attend is not None:
            seen_before = F.pad(attend.cumsum(-1), (1, 0))  # (B, 1, 1, T + 1)
            visible = (seen_before[..., right] - seen_before[..., left]).clamp(min=1).mT
        for start in range(0, frames, CHUNK):
            stop = min(start + CHUNK, frames)
            near = slice(max(0, start - window), min(frames, stop + window))
            count, words = near.stop - near.start, _words(None if attend is None else attend[:, 0, 0, near])
            keys = ops.panels_from(k[:, :, near])
            bits = ops.attention(q[:, :, start:stop], keys, count, width, cost, threshold, words, start - near.start, window)
            yield bits, self.value.columns(v[:, :, near]), count, visible[:, :, start:stop]


class PackedWeights(_Packed):
    """`BinaryWeights`."""

    query: PackedQuantizer
    key: PackedQuantizer
    position: PackedQuantizer
    offset: PackedQuantizer
    probabilities: PackedQuantizer

    @counted_as("attention")
    def forward(
        self, q: Tensor, k: Tensor, p: Tensor, offsets: Tensor, seen: Tensor | None, dropout: float, chunks: Chunks | None = None
    ) -> PackedSharedProbabilities:
        """As `BinaryWeights`."""
        query, key, position, offset = self.query(q), self.key(k), self.position(p), self.offset(offsets)
        lines, width = _with_kept(self, chunks, key.bits), q.size(-1)
        frames, behind = lines.size(2), lines.size(2) - q.size(2)  # keys, and those before the first query
        terms = (query.scale * key.scale, width), (position.scale * offset.scale, p.size(-1))
        cost = _once(chunks, (_costs, self), lambda: _costs(*terms))
        attend = None if seen is None else seen[:, None]
        keys, table, mask = ops.panels_from(lines), ops.panels_from(offset.bits), _mask(attend, len(q))
        threshold = self.probabilities.scale / 2

        def attended(start: int, stop: int, heads: int) -> Tensor:
            rows, places = query.bits[:, :heads, start:stop], position.bits[:, :heads, start:stop]
            return ops.relative_attention(
                rows, places, keys[:, :heads], table[:heads], frames, width, p.size(-1), cost, threshold, _part(mask, start, stop),
                behind + start,
            )  # fmt: skip

        visible = _visible(attend)
        return PackedSharedProbabilities(attended, q, frames, self.probabilities.scale / (frames if visible is None else visible))


class PackedSharedProbabilities:
    """`SharedProbabilities` as bits; those of long input are recomputed for each module."""

    def __init__(self, attended: Callable[[int, int, int], Tensor], q: Tensor, keys: int, scale: Tensor) -> None:
        self.attended, self.frames, self.scale = attended, keys, scale
        self.pieces = list(_pieces(q, keys))
        kept = q.is_meta or q.shape[:3].numel() * keys <= KEPT
        self.bits = [attended(*piece, q.size(1)) for piece in self.pieces] if kept else None

    def mix(self, columns: Tensor, width: int, scale: Tensor) -> Tensor:
        """Mix values, packed along time, of all heads or of the first head, with `width` channels."""
        heads, mixed = columns.size(1), []
        for index, piece in enumerate(self.pieces):
            bits = self.attended(*piece, heads) if self.bits is None else self.bits[index][:, :heads]
            mixed.append(ops.product(bits, columns, width, self.frames, False))
        return torch.cat(mixed, 2).mul_(self.scale * scale)


class PackedMix(_Packed):
    """`BinaryMix`."""

    value: PackedQuantizer

    @counted_as("attention")
    def forward(self, values: Tensor, weights: PackedSharedProbabilities, chunks: Chunks | None = None) -> Tensor:
        """As `BinaryMix`."""
        y = weights.mix(_columns(self.value, chunks, values), values.size(-1), self.value.scale)
        return y.bfloat16() if values.dtype == torch.bfloat16 else y
