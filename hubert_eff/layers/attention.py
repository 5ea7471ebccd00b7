"""Multi-head self-attention by `F.scaled_dot_product_attention` or, with dropout on a CPU, by our own function of the same form."""

# B batch, T frames, D model dim, H heads, d = D / H

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .bits import Cost, attention_cost, counted_as, offsets_seen
from .choice import takes_blocks
from .chunks import Chunks
from .dropout import keep_signs
from .grid import GridAttention
from .kinds import POSITION_PROJECTION, PRODUCT, PROJECTION, Kind, head_shapes
from .linear import Linear, linear, product, takes_onednn
from .position import CHUNK, by_key
from .tracing import follows_shapes, is_symbolic


class _DropoutAttention(torch.autograd.Function):
    """softmax(q k' / sqrt(d) + bias), dropout, times v.

    With dropout, torch's attention on a CPU runs unfused, through slower products and with one random draw per element. Here heads are
    computed one after the other, so that the (T, T) scores of a head stay in cache.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, p: float) -> Tensor:
        rows, keys, values = (q * q.size(-1) ** -0.5).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B H, T, d)
        shape = (*q.shape[:3], k.size(2))
        biases = None if bias is None else bias.expand(shape).flatten(0, 1)
        mixed = torch.empty_like(rows)
        saved = []
        for head in range(rows.size(0)):
            scores = product(rows[head], keys[head])
            if biases is not None:
                scores += biases[head]
            signs, ctx.scale = keep_signs(scores.shape, p)
            probs = torch.softmax(scores, -1).copysign_(signs)  # one tensor to keep: negative = dropped
            mixed[head] = product(probs.relu(), values[head].t())
            saved.append(probs)
        mixed *= ctx.scale
        ctx.save_for_backward(rows, keys, values, mixed, *saved)
        ctx.shape = shape
        return mixed.view(q.shape)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None]:
        rows, keys, values, mixed, *saved = ctx.saved_tensors
        grads = grad.reshape(mixed.shape)
        # the softmax's gradient is P (dP - sum(dP P)), and the sum over the keys is the product of output and its gradient
        sums = (grads * mixed).sum(-1, keepdim=True)
        grad_rows, grad_keys, grad_values = torch.empty_like(rows), torch.empty_like(keys), torch.empty_like(values)
        grad_bias = rows.new_empty(rows.size(0), *ctx.shape[2:]) if ctx.needs_input_grad[3] else None
        for head in range(rows.size(0)):
            kept, probs = saved[head].relu(), saved[head].abs()
            scaled = grads[head] * ctx.scale
            # products are ordered so that oneDNN gets the large matrices as they are and the small ones transposed
            grad_values[head] = product(scaled.t(), kept.t()).t()
            scores = product(scaled, values[head]).mul_(kept).sub_(probs.mul_(sums[head]))
            if grad_bias is not None:
                grad_bias[head] = scores
            grad_rows[head] = product(scores, keys[head].t())
            grad_keys[head] = product(rows[head].t(), scores.t()).t()
        split = (*ctx.shape[:2], -1, grad.size(-1))
        grad_rows *= grad.size(-1) ** -0.5
        bias = None if grad_bias is None else grad_bias.view(ctx.shape)
        return grad_rows.view(split), grad_keys.view(split), grad_values.view(split), bias, None


Bias = Callable[[int, int, int, Tensor], object]
BLOCK = 384  # number of queries whose scores of one head stay in cache, per thread


def _blockwise(q: Tensor, k: Tensor, v: Tensor, add_bias: Bias | None, block: int | None = None) -> Tensor:
    """Compute attention without gradient on a CPU, head by head and by blocks of queries, through oneDNN's products.

    It is for processors on which torch's fused kernel, which uses MKL, is slower. `add_bias(row, start, stop, scores)` adds in place to the
    scores of queries start ... stop - 1 of row b H + h.
    """
    rows = (q * q.size(-1) ** -0.5).flatten(0, 1).contiguous()  # (B H, T, d)
    keys, values = k.flatten(0, 1).contiguous(), v.flatten(0, 1)
    mixed = torch.empty_like(rows)
    block = block or BLOCK * torch.get_num_threads()
    for row in range(rows.size(0)):
        columns = values[row].t().contiguous()
        for start in range(0, rows.size(1), block):
            stop = min(start + block, rows.size(1))
            scores = product(rows[row, start:stop], keys[row])
            if add_bias is not None:
                add_bias(row, start, stop, scores)
            mixed[row, start:stop] = product(torch.softmax(scores, -1, out=scores), columns)
    return mixed.view(q.shape)


def _takes_blocks(q: Tensor, k: Tensor, *others: Tensor | None, relative: bool = False) -> bool:
    """Whether `_blockwise` applies and is faster on this processor."""
    needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, *others))
    return not needs_gradient and takes_onednn(q, k) and takes_blocks(q.size(2), k.size(2), relative)


def _unseen(attend: Tensor, like: Tensor) -> Tensor:
    """0 where `attend` (bool), else -inf."""
    return torch.zeros(attend.shape, dtype=like.dtype, device=like.device).masked_fill_(~attend, float("-inf"))


FUSED_WIDTH = 8  # with biases, a GPU's fused kernel needs heads of a multiple of so many channels


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropout: float) -> Tensor:
    """torch's attention with heads padded by zeros, which change no product: heads of 36 channels would run unfused, in float32."""
    width = q.size(-1)
    q, k, v = (F.pad(x, (0, -width % FUSED_WIDTH)) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=width**-0.5)[..., :width]


@counted_as("attention", lambda q, k, v, bias, *_: attention_cost(q, k, v, bias is not None))
def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """`F.scaled_dot_product_attention` of q (B, H, T, d), k and v (B, H, T', d); bias is bool (False = not visible), float or None."""
    blockwise = dropout == 0.0 and _takes_blocks(q, k, v, bias)
    if not blockwise and (dropout == 0.0 or not takes_onednn(q, k)):
        if bias is not None and q.is_cuda and q.size(-1) % FUSED_WIDTH:
            return _fused(q, k, v, bias, dropout)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    if bias is not None and bias.dtype == torch.bool:
        bias = _unseen(bias, q)
    if not blockwise:
        return _DropoutAttention.apply(q, k, v, bias, dropout)  # type: ignore[no-any-return,no-untyped-call]
    if bias is None:
        return _blockwise(q, k, v, None)
    biases = bias.expand(*q.shape[:3], k.size(2)).flatten(0, 1)
    return _blockwise(q, k, v, lambda row, start, stop, scores: scores.add_(biases[row, start:stop]))


QKV_SOURCES = {"query": ("q_proj", 0), "key": ("k_proj", 0), "value": ("v_proj", 0)}


def _heads(y: Any, heads: int) -> Any:
    """(B, T, H d) -> (B, H, T, d), for a tensor or codes."""
    return y.view(*y.shape[:2], heads, -1).transpose(1, 2) if isinstance(y, Tensor) else y.heads(heads)


class SelfAttention(nn.Module):
    """Dense self-attention, (B, T, D) -> (B, T, D). Projections are stored separately, as in fairseq, and applied as one product."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.k_proj: Linear | None = Linear(dim, dim)
        self.v_proj: Linear | None = Linear(dim, dim)
        self.q_proj: Linear | None = Linear(dim, dim)
        self.qkv_proj: Linear | None = None  # replaces the three once fused
        self.out_proj = Linear(dim, dim)
        self.qkv_input: nn.Module | None = None  # quantizer of the projections' input once binarized
        self.products: nn.Module | None = None  # replaces `attention` once binarized

    def kinds(self) -> Mapping[str, Kind]:
        """Declare the kinds of the parts (`layers.kinds.Declared`)."""
        shapes = head_shapes(self.heads, self.out_proj.in_features // self.heads, "query", "key", "value")
        return {
            **dict.fromkeys(("q_proj", "k_proj", "v_proj"), Kind(PROJECTION, shared="qkv_input")),
            "products": Kind(PRODUCT, form="dense", shapes=shapes, sources=QKV_SOURCES),
            "out_proj": Kind(PROJECTION),
        }

    def projections(self) -> tuple[Linear, ...]:
        """The layers that read the input: the projections to queries, keys and values, or the fused one."""
        return tuple(p for p in (self.q_proj, self.k_proj, self.v_proj, self.qkv_proj) if p is not None)

    def fold(self) -> SelfAttention:
        """Store the three projections as one."""
        if self.qkv_proj is None:
            parts = self.projections()
            joint = Linear(self.out_proj.in_features, 3 * self.out_proj.in_features, device="meta")
            joint.weight = nn.Parameter(torch.cat([p.weight for p in parts]))
            joint.bias = nn.Parameter(torch.cat([p.bias for p in parts]))
            self.q_proj = self.k_proj = self.v_proj = None
            self.qkv_proj = joint.fold().eval()
        return self

    def channels_first(self) -> GridAttention:
        """Build the channels-first twin (`layers.grid`)."""
        assert self.qkv_proj is not None
        return GridAttention(self.qkv_proj, self.out_proj, self.heads)

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, H, T, d); packed projections may return codes of queries and keys for `products`."""
        if self.qkv_input is not None:
            codes = self.qkv_input(x)
            q, k, v = (_heads(p(codes), self.heads) for p in self.projections())
            return q, k, v
        if self.qkv_proj is not None:
            joint = self.qkv_proj(x)
        else:
            parts = self.projections()
            joint = linear(x, torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts]))
        q, k, v = joint.view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def forward(self, x: Tensor, attend: Tensor | None = None, chunks: Chunks | None = None) -> Tensor:
        """Attend. `attend`: bool, broadcastable to (B, H, T, T), False = not visible; `chunks`: those of a stream."""
        q, k, v = self.heads_of(x)
        dropout = self.dropout if self.training else 0.0
        if self.products is not None:
            mixed = self.products(q, k, v, attend, dropout, chunks)
        else:
            k, v = (k, v) if chunks is None else chunks.with_kept(self, k, v)
            mixed = attention(q, k, v, attend, dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def energies(self, x: Tensor, *_: Any) -> Tensor:
        """The input of the softmax, (B, H, T, T), for analysis. It takes the arguments of `forward` and ignores masks."""
        q, k, _v = self.heads_of(x)
        return torch.matmul(q * q.size(-1) ** -0.5, k.mT)


def _relative_cost(_: nn.Module, content: Tensor, position: Tensor, k: Tensor, v: Tensor, *__: Any) -> Cost:
    by_offset = position.shape[:2].numel() * offsets_seen(position.size(2), k.size(2), CHUNK) * position.size(-1)
    macs, element_ops = attention_cost(content, k, v, masked=True)
    return Cost(macs + by_offset, element_ops)


class RelativeSelfAttention(SelfAttention):
    """Self-attention with relative positions (Transformer-XL, section 3.3; Conformer, section 2.1).

    score[i, j] = ((q_i + u) k_j + (q_i + v) p_{i-j}) / sqrt(d), where p = linear_pos(positions). Queries are taken in chunks, and the shift
    from offsets to keys is a strided view of each chunk's product, so no (T, 2T - 1) tensor is copied.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__(dim, heads, dropout)
        self.linear_pos = Linear(dim, dim, bias=False)
        self.pos_bias_u = nn.Parameter(torch.empty(heads, dim // heads))
        self.pos_bias_v = nn.Parameter(torch.empty(heads, dim // heads))
        nn.init.xavier_uniform_(self.pos_bias_u)
        nn.init.xavier_uniform_(self.pos_bias_v)

    def kinds(self) -> Mapping[str, Kind]:
        shapes = head_shapes(
            self.heads, self.out_proj.in_features // self.heads, "key", "value"
        )  # u and v are the learnable biases of queries
        products = Kind(PRODUCT, form="relative", shapes=shapes, sources={name: QKV_SOURCES[name] for name in shapes})
        return {**super().kinds(), "products": products, "linear_pos": Kind(POSITION_PROJECTION)}

    def forward(  # type: ignore[override]
        self, x: Tensor, positions: Tensor, attend: Tensor | None = None, chunks: Chunks | None = None
    ) -> Tensor:
        """`positions`: (2T - 1, D), sinusoids of the offsets T-1 .. -(T-1), T the number of keys; `attend` and `chunks` as above."""
        q, k, v = self.heads_of(x)
        keys = (positions.size(0) + 1) // 2
        p = self._offsets(positions) if chunks is None else chunks.table(self, keys, lambda: self._offsets(positions))
        scale = q.size(-1) ** -0.5
        content, position = q + self.pos_bias_u[:, None], q + self.pos_bias_v[:, None]
        dropout = self.dropout if self.training else 0.0
        if self.products is not None:
            mixed = self.products(content, position, k, p, v, attend, dropout, chunks)
            return self.out_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
        k, v = (k, v) if chunks is None else chunks.with_kept(self, k, v)
        position = position * scale
        if dropout == 0.0 and _takes_blocks(content, k, p, relative=True):
            mixed = self._blockwise(content, position, k, v, p.contiguous(), attend)
        else:
            mixed = self._chunked(content, position, k, v, p, attend, dropout)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def channels_first(self) -> GridAttention:
        assert self.qkv_proj is not None
        return GridAttention(self.qkv_proj, self.out_proj, self.heads, copy.deepcopy(self.linear_pos), (self.pos_bias_u, self.pos_bias_v))

    def energies(self, x: Tensor, positions: Tensor, *_: Any) -> Tensor:
        q, k, _v = self.heads_of(x)
        by_offset = (q + self.pos_bias_v[:, None]) @ self._offsets(positions).mT  # (B, H, T, 2T - 1)
        return torch.matmul(q + self.pos_bias_u[:, None], k.mT).add(by_key(by_offset)).mul(q.size(-1) ** -0.5)

    def _offsets(self, positions: Tensor) -> Tensor:
        return self.linear_pos(positions).view(positions.size(0), self.heads, -1).transpose(0, 1)  # type: ignore[no-any-return]  # (H, 2T - 1, d)

    @counted_as("attention", _relative_cost)
    def _chunked(self, content: Tensor, position: Tensor, k: Tensor, v: Tensor, p: Tensor, attend: Tensor | None, dropout: float) -> Tensor:
        queries, frames = content.size(2), k.size(2)  # the last query is at the last key
        mixed = []
        whole = is_symbolic() or follows_shapes(k)  # one chunk for any length
        for start in [0] if whole else range(0, queries, CHUNK):
            stop = queries if whole else min(start + CHUNK, queries)
            n = stop - start
            span = frames + n - 1  # offsets that this chunk's queries see
            by_offset = position[:, :, start:stop] @ p[:, queries - stop : queries - stop + span].transpose(-1, -2)  # (B, H, n, span)
            bias = by_key(by_offset)
            if bias.is_cuda and attend is None:
                bias = bias.contiguous()  # the memory-efficient kernel refuses a view with a misaligned start
            if attend is not None:
                seen = attend if attend.size(2) == 1 else attend[:, :, start:stop]
                bias = bias.masked_fill(~seen, float("-inf"))
            mixed.append(attention(content[:, :, start:stop], k, v, bias, dropout))
        return torch.cat(mixed, dim=2)

    @counted_as("attention", _relative_cost)
    def _blockwise(self, content: Tensor, position: Tensor, k: Tensor, v: Tensor, p: Tensor, attend: Tensor | None) -> Tensor:
        (batch, heads, queries, _), frames = content.shape, k.size(2)
        position = position.flatten(0, 1)
        unseen = None if attend is None else _unseen(attend, k).expand(batch, heads, -1, frames).flatten(0, 1)

        def add_bias(row: int, start: int, stop: int, scores: Tensor) -> None:
            n, span = stop - start, frames + stop - start - 1
            by_offset = product(position[row, start:stop], p[row % heads, queries - stop : queries - stop + span])
            scores += by_offset.as_strided((n, frames), (span - 1, 1), n - 1)  # as in `_chunked`
            if unseen is not None:
                scores += unseen[row] if unseen.size(1) == 1 else unseen[row, start:stop]

        return _blockwise(content, k, v, add_bias, 2 * CHUNK)  # longer blocks would compute more offsets that no query sees
