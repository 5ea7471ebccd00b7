"""Attention weights that several modules share; they are computed once and applied to the values of each."""

# B batch, T frames, H heads, N = H B rows (head by head), d query and key dim, e position dim, n queries of a block

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .bits import Cost, counted_as, offsets_seen
from .dropout import Dropout
from .linear import product, takes_onednn
from .position import by_key
from .tracing import follows_shapes, is_symbolic

BLOCK = 256  # queries per block; the scores of one row's block stay in cache
KEPT = 1 << 26  # without gradient, weights with more elements are recomputed for each use, block by block
UNSEEN = -1000.0  # the score of an invisible key
LIMIT, PENALTY = 25.0, 1e-4  # in training, this gradient is added to scores beyond the limit


def _times(x: Tensor, y: Tensor) -> Tensor:
    """x (N, M, K) times the transpose of each y (N, L, K), (N, M, L), by oneDNN where it is faster."""
    if not takes_onednn(x, y):
        return x @ y.mT
    if x.size(0) == 1:
        return product(x[0], y[0]).unsqueeze(0)
    return torch.stack([product(a, b) for a, b in zip(x.unbind(0), y.unbind(0), strict=True)])


def _blocks(q: Tensor) -> Iterator[tuple[slice, int, int]]:
    """Yield rows and queries [start, stop) of q (N, T, d) to compute together; on a CPU, one row after the other."""
    group = 1 if takes_onednn(q, q) else q.size(0)
    for row in range(0, q.size(0), group):
        step = q.size(1) if follows_shapes(q) else BLOCK
        for start in range(0, q.size(1), step):
            yield slice(row, row + group), start, min(start + step, q.size(1))


def _at_keys(by_offset: Tensor, frames: int) -> Tensor:
    """View (N, n, T) of (N, n, T + n - 1): row i holds the offsets -(i + start) - (n - 1 - i) ..; key j stands at column n - 1 - i + j."""
    rows, n, span = by_offset.shape
    return by_offset.as_strided((rows, n, frames), (n * span, span - 1, 1), n - 1)


def _scores(q: Tensor, k: Tensor, p: Tensor, offsets: Tensor, start: int) -> Tensor:
    """Compute q_i k_j + p_i offset_{j-i}, (N, n, T), for the queries from `start` on.

    q (N, n, d), k (N, T, d), p (N, n, e), offsets (N, 2T - 1, e).
    """
    n, frames = q.size(1), k.size(1)
    first = frames - start - n
    by_offset = _times(p, offsets[:, first : first + frames + n - 1])
    return _times(q, k).add_(_at_keys(by_offset, frames))


def _rows_of(seen: Tensor | None, rows: slice, start: int, stop: int) -> Tensor | None:
    """The part of seen (N, 1, T) or (N, T, T) for the queries start ... stop - 1 of `rows`, (N', 1 or n, T)."""
    return None if seen is None else seen[rows] if seen.size(1) == 1 else seen[rows, start:stop]


def _softmax(scores: Tensor, seen: Tensor | None) -> Tensor:
    """Softmax in place; seen: (N, 1 or n, T) bool."""
    if seen is not None:
        scores.masked_fill_(~seen, UNSEEN)
    return torch.softmax(scores, -1, out=scores) if not torch.compiler.is_compiling() else torch.softmax(scores, -1)


def _weights(q: Tensor, k: Tensor, p: Tensor, offsets: Tensor, seen: Tensor | None, penalize: bool) -> tuple[Tensor, list[Tensor]]:
    """Yield, block by block, weights (N, queries, keys) and, for the penalty, the signs of scores beyond the limit."""
    weights = q.new_empty(*q.shape[:2], k.size(1))
    beyond = []
    behind = k.size(1) - q.size(1)  # keys of a stream before its queries
    for rows, start, stop in _blocks(q):
        scores = _scores(q[rows, start:stop], k[rows], p[rows, start:stop], offsets[rows], behind + start)
        keys = _rows_of(seen, rows, start, stop)
        if penalize:
            over = torch.where(scores.abs() > LIMIT, scores.sign(), 0.0).to(torch.int8)
            if seen is not None and keys is not None:  # padding gets no gradient
                over *= keys if seen.size(1) > 1 else keys & keys[:, 0, start:stop, None]
            beyond.append(over)
        weights[rows, start:stop] = _softmax(scores, keys)
    return weights, beyond


class _Weights(torch.autograd.Function):
    """Saves nothing of the size of the scores except the result (and where they are penalized)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, p: Tensor, offsets: Tensor, seen: Tensor | None, penalize: bool) -> Tensor:
        weights, beyond = _weights(q, k, p, offsets, seen, penalize)
        ctx.save_for_backward(q, k, p, offsets, weights, *beyond)
        return weights

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, p, offsets, weights, *beyond = ctx.saved_tensors
        frames = k.size(1)
        grad_q, grad_p = torch.empty_like(q), torch.empty_like(p)
        grad_k, grad_offsets = torch.zeros_like(k), torch.zeros_like(offsets)
        for index, (rows, start, stop) in enumerate(_blocks(q)):
            block = weights[rows, start:stop]
            scores = grad[rows, start:stop] * block
            scores -= block * scores.sum(-1, keepdim=True)
            if beyond:
                scores += PENALTY * beyond[index]
            n, first = stop - start, frames - stop
            span = slice(first, first + frames + n - 1)
            by_offset = scores.new_zeros(scores.size(0), n, frames + n - 1)
            _at_keys(by_offset, frames).copy_(scores)
            # oneDNN gets the large matrices as they are and the small ones transposed
            grad_q[rows, start:stop] = _times(scores, k[rows].mT)
            grad_k[rows] += _times(q[rows, start:stop].mT, scores.mT).mT
            grad_p[rows, start:stop] = _times(by_offset, offsets[rows, span].mT)
            grad_offsets[rows, span] += _times(p[rows, start:stop].mT, by_offset.mT).mT
        return grad_q, grad_k, grad_p, grad_offsets, None, None


class _Mix(torch.autograd.Function):
    """Weights (N, T, T) times values (N, T, c)."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(weights, values)
        return _times(weights, values.mT)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        weights, values = ctx.saved_tensors
        return _times(grad, values), _times(grad.mT, weights.mT).mT


def _weights_cost(_: Any, q: Tensor, k: Tensor, p: Tensor, *__: Any) -> Cost:
    pairs = q.shape[:-1].numel() * k.size(2)
    by_offset = p.shape[:2].numel() * offsets_seen(p.size(2), k.size(2), BLOCK) * p.size(-1)
    return Cost(pairs * q.size(-1) + by_offset, 2 * pairs)  # a sum and a softmax


def _mix_cost(weights: RelativeWeights, values: Tensor) -> Cost:
    return Cost(weights.args[0].size(1) * values.numel(), 0)


class RelativeWeights:
    """Weights softmax_j(q_i k_j + p_i offset_{j-i}) of all heads, without the usual 1 / sqrt(d) (Zipformer, section 3.2).

    q, k: (B, H, T, d); p: (B, H, T, e); offsets: (H, 2T - 1, e), those of -(T-1) .. T-1; seen: (B, 1, T) bool, the visible keys, or
    (B, T, T) for each query, none for padding; None = all. In a stream the queries belong to the last keys. `dropout` drops the same
    weights for all modules; `penalize` adds a small gradient against scores beyond +-25.

    With gradients the weights are saved, (H, B, T, T) per layer; without, only up to `KEPT` elements.
    """

    @counted_as("attention", _weights_cost)
    def __init__(
        self, q: Tensor, k: Tensor, p: Tensor, offsets: Tensor, seen: Tensor | None, dropout: Dropout, penalize: bool = False
    ) -> None:
        self.batch, self.heads = q.shape[:2]
        pairs = q.size(2) * k.size(2)
        self.traced: Tensor | None = None
        if is_symbolic():  # in one piece
            scores = q @ k.transpose(-1, -2) + by_key(p @ offsets.transpose(-1, -2))
            self.traced = torch.softmax(scores if seen is None else scores.masked_fill(~seen.unsqueeze(1), UNSEEN), -1)
            return
        q, k, p = (t.transpose(0, 1).flatten(0, 1) for t in (q, k, p))
        offsets = offsets.unsqueeze(1).expand(-1, self.batch, -1, -1).flatten(0, 1)
        rows = None if seen is None else seen.repeat(self.heads, 1, 1)
        self.args = q, k, p, offsets, rows
        self.parts: tuple[Tensor, ...] = ()
        if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, p, offsets)):
            weights: Tensor = _Weights.apply(q, k, p, offsets, rows, penalize)  # type: ignore[no-untyped-call]
        elif q.size(0) * pairs <= KEPT or (dropout.training and dropout.p > 0.0):
            weights = _weights(q, k, p, offsets, rows, penalize=False)[0]
        else:
            return
        weights = dropout(weights)
        # one module uses only the first head; stored separately, that head gets its gradient without zeros for the others
        self.parts = torch.split(weights, [self.batch, q.size(0) - self.batch]) if self.heads > 1 else (weights,)

    @counted_as("attention", _mix_cost)
    def mix(self, values: Tensor) -> Tensor:
        """Sum values (B, H, T, c) of all heads, or (B, 1, T, c) of the first head, over time with the weights of each head."""
        if self.traced is not None:
            return self.traced[:, : int(values.size(1))] @ values
        heads = values.size(1)
        flat = values.transpose(0, 1).flatten(0, 1)
        if not self.parts:
            mixed = self._anew(flat)
        elif heads == 1 or len(self.parts) == 1:
            mixed = _mix(self.parts[0], flat)
        else:
            mixed = torch.cat((_mix(self.parts[0], flat[: self.batch]), _mix(self.parts[1], flat[self.batch :])))
        return mixed.view(heads, self.batch, -1, values.size(3)).transpose(0, 1)

    def _anew(self, values: Tensor) -> Tensor:
        q, k, p, offsets, seen = self.args
        mixed = values.new_empty(values.size(0), q.size(1), values.size(2))
        behind = k.size(1) - q.size(1)
        for rows, start, stop in _blocks(q[: values.size(0)]):
            scores = _scores(q[rows, start:stop], k[rows], p[rows, start:stop], offsets[rows], behind + start)
            mixed[rows, start:stop] = _times(_softmax(scores, _rows_of(seen, rows, start, stop)), values[rows].mT)
        return mixed


def _mix(weights: Tensor, values: Tensor) -> Tensor:
    if torch.is_grad_enabled() and (weights.requires_grad or values.requires_grad):
        return _Mix.apply(weights, values)  # type: ignore[no-any-return,no-untyped-call]
    return _times(weights, values.mT)
