"""Binarized attention products: queries times keys, and probabilities times values.

Queries, keys and values are signed. Probabilities are unsigned, and the quantized tensor is (number of visible keys) x P: its mean is 1
for any length, so its scale is of order 1, and one step of an optimizer changes it little. Queries are processed in chunks; each chunk
has one softmax over all visible keys, followed by its product with the values. In training and in traced graphs, scores, softmax and
dropout are float; in eval mode one-bit probabilities are found by integers (integer_softmax.py), as in a packed model.
"""

# B batch, T frames, H heads, d head dim, e position head dim, n queries of a chunk, G summaries

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.bits import Cost, counted_as, offsets_seen
from ..layers.chunks import Chunks
from ..layers.position import by_key
from ..layers.precision import wide
from ..layers.sparse_pattern import Segment, SparsePattern, chunks, gather_summaries, split_blocks
from ..layers.tracing import follows_shapes, is_tracing
from .functional import initial_scale, scaled, unsigned_codes
from .integer_softmax import HIDDEN, attended_, cost_of_bit
from .modules import Codes, Quantizer

CHUNK = 128  # queries that are processed together
KEPT = 1 << 26  # without gradient, shared probabilities with more elements are recomputed for each use

Shapes = Mapping[str, tuple[int, ...]]
Rows = tuple[Tensor, Callable[[Tensor], Tensor], "Tensor | None", int]  # sums, codes -> product with the values, keys seen, their number


class Term(NamedTuple):
    """A term of the scores: a product of codes times its scale."""

    sums: Tensor  # (..., keys)
    scale: Tensor  # (1,)
    inputs: int  # channels summed over


def chunk(x: Tensor) -> int:
    """Number of queries of x (B, H, T, ...) that are processed together; all if loops must have a fixed number of rounds."""
    return x.size(2) if is_tracing() or follows_shapes(x) else CHUNK


def _times(values: Tensor, codes: Tensor) -> Tensor:
    return codes @ values


def rows_of(x: Tensor | int | None, start: int, stop: int) -> Any:
    """Select the queries start ... stop - 1 of a mask of keys or a number of keys, (B, 1, 1 or T, ...) or one for all."""
    if not isinstance(x, Tensor) or x.dim() == 0 or x.size(2) == 1:  # in a trace a number is a tensor
        return x
    return x[:, :, start:stop]


def with_kept(owner: nn.Module, chunks: Chunks | None, *codes: Codes) -> tuple[Codes, ...]:
    """Put the codes of keys and values that a stream has kept in front of these, (B, H, T, d)."""
    if chunks is None:
        return codes
    values = chunks.with_kept(owner, *(part.values for part in codes))
    return tuple(Codes(value, part.scale) for value, part in zip(values, codes, strict=True))


def _pairs(heads: int, q: Tensor, valid: Tensor | None, attend: Tensor | None) -> Tensor | int:
    """Number of probabilities of queries and keys that are not padding; `attend`: (B, 1, 1 or T, T) bool."""
    if attend is not None and attend.size(2) > 1:
        seen = attend.sum(-1).expand(q.size(0), 1, -1)
        return heads * (seen if valid is None else seen.masked_fill(~valid.unsqueeze(1), 0)).sum()
    return heads * q.size(0) * q.size(2) ** 2 if valid is None else heads * valid.sum(1).square().sum()


def offsets_cost(heads: int, queries: int, table: Tensor, inputs: int) -> Cost:
    """Cost of the products of queries of `inputs` channels with the rows of a table (H, 2T - 1, ...) that they see, chunk by chunk."""
    return Cost(heads * offsets_seen(queries, (table.size(1) + 1) // 2, CHUNK) * inputs, 0)


@counted_as("attention", lambda q, table, _: offsets_cost(q.shape[:2].numel(), q.size(2), table, q.size(3)))
def at_keys(queries: Tensor, table: Tensor, start: int) -> Tensor:
    """queries (B, H, n, e) from query `start` on, times the row of table (H, 2T - 1, e) that belongs to each key: (B, H, n, T).

    Row T - 1 - i + j of the table is that of query i and key j.
    """
    n, frames = queries.size(2), (table.size(1) + 1) // 2
    first, span = frames - start - n, frames + n - 1
    return by_key(queries @ table[:, first : first + span].transpose(-1, -2))  # of (B, H, n, span)


def _table_mask(frames: int, valid: Tensor | None) -> Tensor | None:
    """Mask of the rows of a table (H, 2T - 1, e) that are offsets between valid frames."""
    if valid is None:
        return None
    offsets = torch.arange(1 - frames, frames, device=valid.device).abs()
    return (offsets < valid.sum(1).amax()).view(1, -1, 1)


class Probabilities(nn.Module):
    """Quantizer of (visible keys) x P; the module that holds it computes the product with the values.

    by_softmax: compute floats in eval mode too, as graphs to be traced must.
    """

    by_softmax = False

    def __init__(self, bits: int) -> None:
        super().__init__()
        # at one bit the threshold, half the scale, starts at the mean, 1. The formula would give 2, above every probability of a model
        # with still uniform attention: no bit would be set, the output would be zero, and no gradient would reach the attention
        initial = 2.0 if bits == 1 else float(initial_scale(1.0, False, 2**bits - 1))
        self.quantizer = Quantizer(bits, signed=False, initial=initial)
        self.dropped = "codes"  # what dropout zeroes: codes or probabilities (`Policy.attention_dropout`)

    def forward(self, terms: Sequence[Term], seen: Tensor | None, visible: Tensor | int, scale: Tensor, dropout: float) -> Tensor:
        """Compute codes of softmax(scores), scores (..., keys); seen: bool, broadcast to scores; visible: number of visible keys, (..., 1).

        `scale`: `quantizer.effective` of the whole tensor to which these belong.
        """
        by_integers = self.quantizer.bits == 1 and not (self.training or self.by_softmax or is_tracing())
        if not by_integers:
            return self._codes(terms, seen, visible, scale, dropout)
        with torch.no_grad():
            codes = self._attended(terms, seen, visible, scale)
        if self.quantizer.watch is None and not (torch.is_grad_enabled() and any(term.sums.requires_grad for term in terms)):
            return codes
        soft = self._codes(terms, seen, visible, scale, dropout)
        return soft - soft.detach() + codes  # the gradient of training

    def _attended(self, terms: Sequence[Term], seen: Tensor | None, visible: Tensor | int, scale: Tensor) -> Tensor:
        costs = None
        for sums, factor, inputs in terms:
            differing = torch.rsub(sums, inputs / 2, alpha=0.5).to(torch.int32)
            cost = differing.mul_(cost_of_bit(factor, inputs))
            costs = cost if costs is None else costs.add_(cost)
        assert costs is not None
        if seen is not None:
            costs.masked_fill_(~seen, HIDDEN)
        return attended_(costs, visible, scale / 2)

    def _codes(self, terms: Sequence[Term], seen: Tensor | None, visible: Tensor | int, scale: Tensor, dropout: float) -> Tensor:
        scores = scaled(terms[0].sums, terms[0].scale, self.quantizer.dtype)
        for term in terms[1:]:
            scores = scores + scaled(term.sums, term.scale, self.quantizer.dtype)
        if seen is not None:
            scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min / 2)  # finite, because a query may see nothing
        probs = torch.softmax(scores, -1)
        if dropout > 0.0 and self.dropped == "probabilities":
            probs = F.dropout(probs, dropout)
        x = (wide(probs) * visible).to(probs.dtype)
        offset = None
        if self.quantizer.bits > 1:
            least = (x.detach() if seen is None else x.detach().masked_fill(~seen, torch.inf)).amin(-1, keepdim=True)
            offset = least.masked_fill(least == torch.inf, 0.0)
        codes = unsigned_codes(x, scale, self.quantizer.bits, offset)
        if offset is not None and seen is not None:
            codes = codes.masked_fill(~seen, 0.0)  # a code of 0 stands for the minimum
        if self.quantizer.watch is not None:
            self.quantizer.watch(x, codes, scale, offset, seen)
        return F.dropout(codes, dropout) if dropout > 0.0 and self.dropped == "codes" else codes


class BinaryAttention(nn.Module):
    """Dense attention: softmax(q k' / sqrt(d)) v.

    bits: the width of all operands. shapes: the shapes of the learnable biases of query, key and value (BiT's moves, added after the
    projections); an operand without an entry has none.
    """

    signed_operands: tuple[str, ...] = ("query", "key", "value")
    query: Quantizer
    key: Quantizer
    value: Quantizer

    def __init__(self, bits: int, shapes: Shapes) -> None:
        super().__init__()
        self.operand_bits = (bits, bits)
        for name in self.signed_operands:
            self.add_module(name, Quantizer(bits, True, shapes.get(name)))
        self.probabilities = Probabilities(bits)

    @counted_as("attention")
    def forward(self, q: Tensor, k: Tensor, v: Tensor, attend: Tensor | None, dropout: float, chunks: Chunks | None = None) -> Tensor:
        """q, k, v (B, H, T, d); attend: (B, 1, 1 or T, T) bool, the visible keys -> (B, H, T, d). A stream has more keys than queries;
        those of `chunks` come first."""
        query = self.query(q)
        key, value = with_kept(self, chunks, self.key(k), self.value(v))
        scale: Tensor = query.scale * key.scale * q.size(-1) ** -0.5

        def terms(start: int, stop: int) -> list[Term]:
            return [Term(query.values[:, :, start:stop] @ key.values.transpose(-1, -2), scale, q.size(-1))]

        return self._mixed(terms, q, value, attend, dropout)

    def _mixed(self, terms: Callable[[int, int], list[Term]], q: Tensor, value: Codes, attend: Tensor | None, dropout: float) -> Tensor:
        """`terms(start, stop)`: sums (B, H, n, T) of the queries start ... stop - 1."""
        frames = q.size(2)
        visible = value.values.size(2) if attend is None else attend.sum(-1, keepdim=True).clamp(min=1)
        scale = self.probabilities.quantizer.effective(_pairs(q.size(1), q, self.value.frames.valid, attend))
        mixed = []
        step = chunk(q)
        for start in range(0, frames, step):
            stop = min(start + step, frames)
            codes = self.probabilities(terms(start, stop), rows_of(attend, start, stop), rows_of(visible, start, stop), scale, dropout)
            mixed.append(codes.to(value.values.dtype) @ value.values)
        return scaled(torch.cat(mixed, 2), scale * value.scale / visible, self.value.dtype)


class BinaryRelativeAttention(BinaryAttention):
    """The same with relative positions: ((q + u) k' + (q + v) r') / sqrt(d). The float model's u and v become biases of queries."""

    signed_operands = ("content", "position", "key", "offset", "value")
    content: Quantizer
    position: Quantizer
    offset: Quantizer

    @counted_as("attention")
    def forward(  # type: ignore[override]
        self, content: Tensor, position: Tensor, k: Tensor, r: Tensor, v: Tensor, attend: Tensor | None, dropout: float,
        chunks: Chunks | None = None,
    ) -> Tensor:  # fmt: skip
        """content = q + u, position = q + v, k, v (B, H, T, d); r: (H, 2T - 1, d), of the offsets T-1 .. -(T-1) from query to key, T the
        number of keys."""
        contents, positions, width = self.content(content), self.position(position), k.size(-1) ** -0.5
        key, value = with_kept(self, chunks, self.key(k), self.value(v))
        offset = self.offset.masked(r, _table_mask(k.size(2), self.key.frames.valid))
        behind = key.values.size(2) - k.size(2)  # keys of a stream before its queries
        scale: Tensor = contents.scale * key.scale * width
        position_scale: Tensor = positions.scale * offset.scale * width

        def terms(start: int, stop: int) -> list[Term]:
            sums = contents.values[:, :, start:stop] @ key.values.transpose(-1, -2)
            places = at_keys(positions.values[:, :, start:stop], offset.values, behind + start)
            return [Term(sums, scale, k.size(-1)), Term(places, position_scale, k.size(-1))]

        return self._mixed(terms, k, value, attend, dropout)


class BinarySparseAttention(BinaryAttention):
    """Attention over a sparse pattern: one softmax over a query's own keys and the summaries; no tensor has T squared elements."""

    @counted_as("attention")
    def forward(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, attend: Tensor | None, dropout: float, pattern: SparsePattern, chunks: Chunks | None = None
    ) -> Tensor:
        """Attend as `BinaryAttention` does; in chunks `attend` is the joint mask of chunks and pattern."""
        if chunks is not None:
            return super().forward(q, k, v, attend, dropout, chunks)
        query, key, value = self.query(q), self.key(k), self.value(v)
        frames, valid = q.size(2), self.query.frames.valid
        scale = query.scale * key.scale * q.size(-1) ** -0.5
        length = torch.full((q.size(0),), frames, device=q.device) if valid is None else valid.sum(1)
        own_scale = self.probabilities.quantizer.effective(q.size(1) * (length * pattern.visible(length)).sum())
        rows = self._banded if pattern.kind == "local" else self._blocked
        if is_tracing():
            rows = self._dense
        mixed = []
        for sums, product, seen, keys in rows(query.values, key.values, value.values, attend, pattern):
            visible = keys if seen is None else seen.sum(-1, keepdim=True).clamp(min=1)
            codes = self.probabilities([Term(sums, scale, q.size(-1))], seen, visible, own_scale, dropout)
            mixed.append(scaled(product(codes.to(value.values.dtype)), own_scale * value.scale / visible, self.value.dtype))
        return torch.cat(mixed, 2)

    @staticmethod
    def _dense(q: Tensor, k: Tensor, v: Tensor, attend: Tensor | None, pattern: SparsePattern) -> Iterator[Rows]:
        """Attend to all keys under the pattern's mask, for a trace, in which blocks cannot depend on the length."""
        place = torch.arange(q.size(2), device=q.device)
        seen = pattern.sees(place, place)
        seen = seen if attend is None else seen & attend
        yield q @ k.transpose(-1, -2), partial(_times, v), seen[None, None] if seen.dim() == 2 else seen, 0

    @staticmethod
    def _blocked(q: Tensor, k: Tensor, v: Tensor, attend: Tensor | None, pattern: SparsePattern) -> Iterator[Rows]:
        segments = pattern.segments(q.size(2))
        keys, values = gather_summaries(k, segments), gather_summaries(v, segments)  # (B, H, G, d)
        column = None if attend is None else attend.mT  # (B, 1, T, 1)
        far_seen = None if column is None else gather_summaries(column, segments).mT  # (B, 1, 1, G)
        for s in segments if follows_shapes(q) else chunks(segments):
            ours = q[:, :, s.place]  # (B, H, n L, d)
            near = (split_blocks(ours, s.count) @ s.blocks(k)[:, :, :, : s.own].mT).flatten(2, 3)  # (B, H, n L, own)
            scores = torch.cat((near, ours @ keys.mT), -1)
            seen = None
            if column is not None and far_seen is not None:
                near_seen = s.blocks(column)[:, :, :, : s.own].mT.expand(-1, -1, -1, s.length, -1).flatten(2, 3)
                seen = torch.cat((near_seen, far_seen.expand(-1, -1, ours.size(2), -1)), -1)

            def product(codes: Tensor, s: Segment = s) -> Tensor:
                own = split_blocks(codes[..., : s.own], s.count) @ s.blocks(v)[:, :, :, : s.own]
                return own.flatten(2, 3) + codes[..., s.own :] @ values

            yield scores, product, seen, scores.size(-1)

    @staticmethod
    def _banded(q: Tensor, k: Tensor, v: Tensor, attend: Tensor | None, pattern: SparsePattern) -> Iterator[Rows]:
        frames, window = q.size(2), pattern.window
        place = torch.arange(frames, device=q.device)
        for start in range(0, frames, CHUNK):
            stop = min(start + CHUNK, frames)
            near = slice(max(0, start - window), min(frames, stop + window))
            seen = ((place[start:stop, None] - place[near]).abs() <= window)[None, None]  # (1, 1, n, keys)
            if attend is not None:
                seen = seen & attend[..., near]
            values = v[:, :, near]
            yield q[:, :, start:stop] @ k[:, :, near].mT, partial(_times, values), seen, 0


class BinaryWeights(nn.Module):
    """Attention weights that several modules share (Zipformer): softmax_j(q_i k_j + p_i offset_{j-i})."""

    query: Quantizer
    key: Quantizer
    position: Quantizer
    offset: Quantizer

    def __init__(self, bits: int, shapes: Shapes) -> None:
        super().__init__()
        self.operand_bits = (bits, bits)
        for name in ("query", "key", "position", "offset"):
            self.add_module(name, Quantizer(bits, True, shapes.get(name)))
        self.probabilities = Probabilities(bits)

    @counted_as("attention")
    def forward(
        self, q: Tensor, k: Tensor, p: Tensor, offsets: Tensor, seen: Tensor | None, dropout: float, chunks: Chunks | None = None
    ) -> SharedProbabilities:
        """q, k (B, H, T, d), p (B, H, T, e), offsets (H, 2T - 1, e), those of -(T-1) .. T-1, T the number of keys; seen (B, 1 or T, T)
        bool."""
        frames, valid = q.size(2), self.query.frames.valid
        query, position = self.query(q), self.position(p)
        (key,) = with_kept(self, chunks, self.key(k))
        behind = key.values.size(2) - frames
        offset = self.offset.masked(offsets, _table_mask(frames, valid))
        scale, position_scale = query.scale * key.scale, position.scale * offset.scale
        attend = None if seen is None else seen[:, None]
        visible = behind + frames if attend is None else attend.sum(-1, keepdim=True).clamp(min=1)
        own_scale = self.probabilities.quantizer.effective(_pairs(q.size(1), q, valid, attend))

        def codes(start: int, heads: int) -> Tensor:
            stop = min(start + chunk(q), frames)
            part = slice(start, stop)
            sums = query.values[:, :heads, part] @ key.values[:, :heads].transpose(-1, -2)
            places = at_keys(position.values[:, :heads, part], offset.values[:heads], behind + start)
            terms = [Term(sums, scale, q.size(-1)), Term(places, position_scale, p.size(-1))]
            seen = rows_of(attend, start, stop)
            return self.probabilities(terms, seen, rows_of(visible, start, stop), own_scale, dropout)  # type: ignore[no-any-return]

        kept = torch.is_grad_enabled() or dropout > 0.0 or q.is_meta or q.size(0) * q.size(1) * frames**2 <= KEPT
        starts = range(0, frames, chunk(q))
        return SharedProbabilities(codes, starts, q.size(1), own_scale / visible, kept, self.query.dtype)


class SharedProbabilities:
    """Quantized attention weights for several modules; without gradient, those of long input are recomputed for each."""

    def __init__(
        self, codes: Callable[[int, int], Tensor], starts: range, heads: int, scale: Tensor, kept: bool, dtype: torch.dtype
    ) -> None:
        self.codes, self.scale, self.starts, self.dtype = codes, scale, starts, dtype
        self.parts = [codes(start, heads) for start in self.starts] if kept else None

    def mix(self, value: Codes) -> Tensor:
        """Sum values (B, H, T, c) of all heads, or (B, 1, T, c) of the first head, over time with the weights of each head."""
        heads = value.values.size(1)
        mixed = []
        for index, start in enumerate(self.starts):
            codes = self.codes(start, heads) if self.parts is None else self.parts[index][:, :heads]
            mixed.append(codes.to(value.values.dtype) @ value.values)
        return scaled(torch.cat(mixed, 2), self.scale * value.scale, self.dtype)


class BinaryMix(nn.Module):
    """Quantizes values and mixes them by shared attention weights."""

    def __init__(self, bits: int, shapes: Shapes) -> None:
        super().__init__()
        self.operand_bits = (bits, bits)
        self.value = Quantizer(bits, True, shapes.get("value"))

    @counted_as("attention")
    def forward(self, values: Tensor, weights: SharedProbabilities, chunks: Chunks | None = None) -> Tensor:
        """values (B, H, T, c), or (B, 1, T, c) for the first head's weights."""
        return weights.mix(*with_kept(self, chunks, self.value(values)))


FORMS: dict[str, Callable[[int, Shapes], nn.Module]] = {  # `Kind.form` of a product
    "dense": BinaryAttention,
    "relative": BinaryRelativeAttention,
    "sparse": BinarySparseAttention,
    "weights": BinaryWeights,
    "mix": BinaryMix,
}
