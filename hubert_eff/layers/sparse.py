"""Self-attention in which a frame sees only some frames (`sparse_pattern`), computed exactly and without a (T, T) tensor."""

# B batch, T frames, D model dim, H heads, d = D / H, l stride, c expressivity, n blocks, L frames of a block, G summaries, W window

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import get_device_states, set_device_states

from ..errors import UserError
from .attention import SelfAttention, attention
from .bits import Cost, counted_as
from .chunks import Chunks
from .dropout import Dropout
from .flex import compiled_flex, takes_flex
from .grid import GridAttention
from .kinds import Kind
from .sparse_pattern import Segment, SparsePattern, chunks, gather_summaries, put_summaries, split_blocks
from .tracing import follows_shapes, is_symbolic

SPAN = 128  # queries that share one window of keys in `_windowed`

_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)  # private, and torch may change them
_FLASH_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def _fold(blocks: Tensor) -> Tensor:
    """(B, H, n, L, d) -> (B n, H, L, d)."""
    return blocks.transpose(1, 2).flatten(0, 1)


def _unfold(x: Tensor, count: int) -> Tensor:
    """(B n, H, L, d) -> (B, H, n, L, d)."""
    return torch.unflatten(x, 0, (-1, count)).transpose(1, 2)


def _row(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.transpose(-1, -2)


class _Flash(torch.autograd.Function):
    """Runs both parts of the keys through torch's fused kernel and joins them by their log-sum-exp.

    If s is the log-sum-exp of all scores of a query, its probabilities are exp(score - s) in either part. So the kernel's own backward
    pass, given the joint output and s, returns each part's share of the gradient.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, segments: list[Segment]) -> Tensor:
        assert _FLASH is not None
        kept = None if bias is None else gather_summaries(bias, segments)
        keys, values = gather_summaries(k, segments), gather_summaries(v, segments)  # (B, H, G, d)
        if keys.size(2):
            out, total = _FLASH(q, keys, values, attn_mask=_row(kept))  # (B, H, T, d), (B, H, T)
        else:
            out, total = torch.zeros_like(q), q.new_full(q.shape[:3], torch.finfo(q.dtype).min)
        for s in segments:
            if not s.own:
                continue
            mask = None if bias is None else _row(_fold(s.blocks(bias)[:, :, :, : s.own]))
            own = _FLASH(_fold(s.blocks(q)), *(_fold(s.blocks(x)[:, :, :, : s.own]) for x in (k, v)), attn_mask=mask)
            mixed, scores = s.blocks(out), s.blocks(total.unsqueeze(-1))  # views
            other = _unfold(own[1].unsqueeze(-1), s.count)
            mixed.lerp_(_unfold(own[0], s.count), torch.sigmoid(other - scores).to(out.dtype))
            scores.copy_(torch.logaddexp(scores, other))
        ctx.save_for_backward(q, k, v, bias, out, total)
        ctx.segments = segments
        return out  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        assert _FLASH_BACKWARD is not None
        q, k, v, bias, out, total = ctx.saved_tensors
        segments: list[Segment] = ctx.segments
        keys, values = gather_summaries(k, segments), gather_summaries(v, segments)
        grad_k, grad_v = torch.empty_like(k), torch.empty_like(v)
        if keys.size(2):
            kept = None if bias is None else _row(gather_summaries(bias, segments))
            grad_q, *shares = _FLASH_BACKWARD(grad, q, keys, values, out, total, 0.0, False, attn_mask=kept)
            put_summaries(grad_k, shares[0], segments)
            put_summaries(grad_v, shares[1], segments)
        else:
            grad_q = torch.zeros_like(q)
        for s in segments:
            if not s.own:
                continue
            mask = None if bias is None else _row(_fold(s.blocks(bias)[:, :, :, : s.own]))
            inner = [_fold(s.blocks(x)[:, :, :, : s.own]) for x in (k, v)]
            outer = [_fold(s.blocks(x)) for x in (grad, q, out)]
            scores = _fold(s.blocks(total.unsqueeze(-1))).squeeze(-1)
            own = _FLASH_BACKWARD(*outer[:2], *inner, outer[2], scores, 0.0, False, attn_mask=mask)
            s.blocks(grad_q).add_(_unfold(own[0], s.count))
            for whole, share in zip((grad_k, grad_v), own[1:], strict=True):
                s.blocks(whole)[:, :, :, : s.own] = _unfold(share, s.count)
        return grad_q, grad_k, grad_v, None, None


def _is_eager() -> bool:
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is None


def _takes_flash(q: Tensor) -> bool:
    """Whether `_Flash` applies: an eager pass on a CPU whose torch has the kernel."""
    return _FLASH is not None and _FLASH_BACKWARD is not None and q.device.type == "cpu" and q.numel() > 0 and _is_eager()


def _rows(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, keys: Tensor, values: Tensor, kept: Tensor | None,
    count: int, own: int, dropout: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    """Attention of `count` full blocks q, k, v (B, H, n L, d) to their own keys and to the summaries (B, H, G, d)."""
    q = q * q.size(-1) ** -0.5
    near = split_blocks(q, count) @ split_blocks(k, count)[:, :, :, :own].transpose(-1, -2)  # (B, H, n, L, own)
    far = q @ keys.transpose(-1, -2)  # (B, H, n L, G)
    if bias is not None and kept is not None:
        near = near + split_blocks(bias, count)[:, :, :, :own].transpose(-1, -2)
        far = far + kept.transpose(-1, -2)
    probs = dropout(torch.softmax(torch.cat((near.flatten(2, 3), far), -1), -1)).to(v.dtype)
    near, far = probs[..., :own], probs[..., own:]
    mixed = (split_blocks(near, count) @ split_blocks(v, count)[:, :, :, :own]).flatten(2, 3)
    return mixed + far @ values


def _plain(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, segments: list[Segment], dropout: Callable[[Tensor], Tensor]
) -> Iterator[tuple[slice, Tensor]]:
    """The same by ordinary operations: yields the place in time and the output (B, H, rows, d) of one chunk after the other."""
    keys, values = gather_summaries(k, segments), gather_summaries(v, segments)
    kept = None if bias is None else gather_summaries(bias, segments)
    for s in segments if follows_shapes(q) else chunks(segments):
        part = s.place
        seen = None if bias is None else bias[:, :, part]
        yield part, _rows(q[:, :, part], k[:, :, part], v[:, :, part], seen, keys, values, kept, s.count, s.own, dropout)


class _Recomputed(torch.autograd.Function):
    """`_plain` with a backward pass that recomputes the scores of each chunk, with the same draws, instead of saving them.

    torch's own checkpoint of each chunk would also work, but leaves holes in glibc's heap that grow with T squared.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, segments: list[Segment], dropout: Callable[[Tensor], Tensor]
    ) -> Tensor:
        kind = "cpu" if q.is_meta else q.device.type  # autocast does not know meta tensors
        ctx.random = torch.get_rng_state(), *get_device_states(q)
        ctx.precision = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
        out = torch.empty_like(q)
        for part, mixed in _plain(q, k, v, bias, segments, dropout):
            out[:, :, part] = mixed
        ctx.save_for_backward(q, k, v, bias)
        ctx.segments, ctx.dropout = segments, dropout
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v, bias = ctx.saved_tensors
        state, devices, states = ctx.random
        grads = [torch.empty_like(x) for x in (q, k, v)]
        keys, values = (gather_summaries(x, ctx.segments).requires_grad_() for x in (k, v))
        grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
        kept = None if bias is None else gather_summaries(bias, ctx.segments)
        with torch.random.fork_rng(devices), torch.set_grad_enabled(True), torch.autocast(q.device.type, **ctx.precision):
            torch.set_rng_state(state)
            set_device_states(devices, states)
            for s in chunks(ctx.segments):
                part = s.place
                a, b, c = (x[:, :, part].detach().requires_grad_() for x in (q, k, v))
                seen = None if bias is None else bias[:, :, part]
                mixed = _rows(a, b, c, seen, keys, values, kept, s.count, s.own, ctx.dropout)
                shares = torch.autograd.grad(mixed, (a, b, c, keys, values), grad[:, :, part].to(mixed.dtype))
                for whole, share in zip(grads, shares[:3], strict=True):
                    whole[:, :, part] = share
                grad_keys += shares[3]
                grad_values += shares[4]
        put_summaries(grads[1], grad_keys, ctx.segments)
        put_summaries(grads[2], grad_values, ctx.segments)
        return grads[0], grads[1], grads[2], None, None, None


def _bands(frames: int, window: int) -> tuple[int, int, int, int]:
    """(window, queries of a block, blocks, keys of a block) of `_windowed`."""
    window = min(window, frames)
    length = min(max(SPAN, window), frames)
    return window, length, -(-frames // length), length + 2 * window


def _windowed(q: Tensor, k: Tensor, v: Tensor, attend: Tensor | None, window: int, dropout: float) -> Tensor:
    """|i - j| <= window: blocks of queries, each with the keys from `window` frames before it to `window` frames after it."""
    frames = q.size(2)
    window, length, count, span = _bands(frames, window)
    behind = count * length - frames

    def windows(x: Tensor) -> Tensor:  # (B, H, T, d) -> (B n, H, span, d)
        x = F.pad(x, (0, 0, window, behind + length))

        def blocks(start: int, size: int) -> Tensor:
            return split_blocks(x[:, :, start : start + count * length], count)[:, :, :, :size]

        return _fold(torch.cat((blocks(0, window), blocks(window, length), blocks(window + length, window)), 3))

    offsets = torch.arange(span, device=q.device) - torch.arange(length, device=q.device).unsqueeze(1)
    band = (offsets >= 0) & (offsets <= 2 * window)  # (L, span)
    if attend is None:
        attend = torch.ones(1, 1, 1, frames, dtype=torch.bool, device=q.device)
    real = windows(attend.transpose(-1, -2)).transpose(-1, -2)  # (B n, 1, 1, span)
    bias = _bias(band & real, q.dtype)
    bias = bias.expand(q.size(0), count, 1, length, span).flatten(0, 1) if len(bias) < q.size(0) * count else bias
    queries = _fold(split_blocks(F.pad(q, (0, 0, 0, behind)) if behind else q, count))  # a compiler mistakes the strides of an empty pad
    mixed = attention(queries, windows(k), windows(v), bias, dropout)
    return _unfold(mixed, count).flatten(2, 3)[:, :, :frames]


def _bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `seen`, otherwise so low that a key is never chosen; finite, which avoids 0 / 0 for a query that sees nothing."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min / 2)


def _cost(q: Tensor, k: Tensor, v: Tensor, pattern: SparsePattern, attend: Tensor | None = None, *rest: Any) -> Cost:
    frames, rows = q.size(2), q.shape[:2].numel()
    if pattern.kind == "local":
        _, length, count, span = _bands(frames, pattern.window)
        pairs, masked, scaled = rows * count * length * span, True, rows * count * (length + span) * q.size(-1)
    else:
        segments = pattern.segments(frames)
        summaries = sum(s.count * (s.length - s.own) for s in segments)
        pairs = rows * (frames * summaries + sum(s.count * s.length * s.own for s in segments))
        masked, scaled = attend is not None, q.numel() + k.numel()
    return Cost(pairs * (q.size(-1) + v.size(-1)), scaled + pairs * (2 if masked else 1))


@counted_as("attention", _cost)
def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: SparsePattern, attend: Tensor | None = None, dropout: Dropout | None = None,
    flex: Callable[..., Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """softmax(q k' / sqrt(d)) v of q, k, v (B, H, T, d) over the keys that `pattern` and `attend` (B, 1, 1, T) bool let through.

    It equals dense attention under the pattern's mask; a query that sees no key has some finite output. `dropout` applies to probabilities.
    `flex`: FlexAttention, used on a GPU if nothing is dropped. No tensor has T squared elements.
    """
    drops = dropout is not None and dropout.training and dropout.p > 0
    if flex is not None and not drops and takes_flex(q):
        return flex(q, k, v, attend, pattern)
    if is_symbolic():
        place = torch.arange(q.size(2), device=q.device)
        seen = pattern.sees(place, place)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen if attend is None else seen & attend)
    if pattern.kind == "local":
        return _windowed(q, k, v, attend, pattern.window, dropout.p if dropout is not None and drops else 0.0)
    segments = pattern.segments(q.size(2))
    bias = None if attend is None else _bias(attend.transpose(-1, -2), q.dtype)  # (B, 1, T, 1)
    if not drops and _takes_flash(q):
        return _Flash.apply(q, k, v, bias, segments)  # type: ignore[no-any-return,no-untyped-call]
    drop: Callable[[Tensor], Tensor] = dropout if dropout is not None else torch.nn.Identity()
    if _is_eager():
        return _Recomputed.apply(q, k, v, bias, segments, drop)  # type: ignore[no-any-return,no-untyped-call]
    return torch.cat([mixed for _, mixed in _plain(q, k, v, bias, segments, drop)], 2)  # a compiler decides what to save


class SparseSelfAttention(SelfAttention):
    """`SelfAttention` over a sparse pattern, with the same parameters."""

    def __init__(self, dim: int, heads: int, dropout: float, pattern: SparsePattern, flex: bool = False) -> None:
        super().__init__(dim, heads, dropout)
        self.pattern = pattern
        self.flex = compiled_flex() if flex else None
        self.attention_dropout = Dropout(dropout)

    def kinds(self) -> Mapping[str, Kind]:
        dense = super().kinds()
        return {**dense, "products": replace(dense["products"], form="sparse")}

    def channels_first(self) -> GridAttention:
        """Raise `UserError`, because the twin of dense attention would see every key."""
        raise UserError("sparse attention cannot be rewritten: it has no channels-first form")

    def forward(self, x: Tensor, attend: Tensor | None = None, chunks: Chunks | None = None) -> Tensor:
        """Attend. `attend`: (B, 1, 1, T) bool, False = not visible, or (B, 1, T, T), with `chunks` or without."""
        q, k, v = self.heads_of(x)
        if chunks is None and attend is not None and attend.size(2) > 1:
            chunks = Chunks(attend.size(2), -1)  # a single chunk: only the mask says what is visible
        dropout = self.dropout if self.training else 0.0
        if chunks is not None:
            attend = self._seen_in_chunks(x, attend, chunks)
        if self.products is not None:
            mixed = self.products(q, k, v, attend, dropout, self.pattern, chunks)
        elif chunks is not None:
            k, v = chunks.with_kept(self, k, v)
            mixed = attention(q, k, v, attend, dropout)
        else:
            mixed = sparse_attention(q, k, v, self.pattern, attend, self.attention_dropout, self.flex)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _seen_in_chunks(self, x: Tensor, attend: Tensor | None, chunks: Chunks) -> Tensor:
        """Attend densely under the joint mask of pattern and chunks, since a frame sees most of the few keys in its chunks anyway."""
        queries, keys = x.size(1), chunks.keys(x.size(1))
        end = chunks.start + queries

        def seen() -> Tensor:
            place = torch.arange(end - keys, end, device=x.device)
            return self.pattern.sees(place[keys - queries :], place)[None, None]  # (1, 1, queries, keys)

        if attend is None:  # a stream, whose blocks share it
            return chunks.table(self.pattern, end, lambda: _one_row(seen()))
        return attend & (seen() | torch.eye(queries, dtype=torch.bool, device=x.device))


def _one_row(seen: Tensor) -> Tensor:
    """Reduce a mask (1, 1, queries, keys) to one row if all queries see the same keys."""
    return seen[:, :, :1] if bool((seen == seen[:, :, :1]).all()) else seen
