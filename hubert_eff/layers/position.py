"""Positional embeddings."""

# B batch, T frames, D model dim

from __future__ import annotations

import math
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .bits import Cost, counted_as
from .choice import takes_spectrum
from .chunks import Chunks
from .convolution import with_zero_tap
from .spectral import convolve_blocks, spectrum
from .tracing import is_exporting, is_symbolic

CHUNK = 128  # queries whose products with relative positions are computed together and stay in cache


def _cost(_: nn.Module, x: Tensor, weight: Tensor) -> Cost:  # without the zero tap that bfloat16 may take
    return Cost(x.size(0) * (x.size(2) - weight.size(2) + 1) * weight.numel(), 0)


def _block_cost(module: PositionalConv1d, x: Tensor, before: int) -> Cost:  # that of the convolution
    return Cost(x.shape[:2].numel() * math.prod(module.shape), 0)


_spectra: WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], Tensor]] = WeakKeyDictionary()  # not kept with a module that is saved


class PositionalConv1d(nn.Module):
    """Grouped convolution over time with weight normalization per tap (wav2vec 2.0, section 2); (B, T, D) -> (B, T, D).

    The kernel is centered (an even one sees one more frame before than after), or ends at its frame if `causal`.
    Parameters have fairseq's names: the weight is `weight_g * weight_v / |weight_v|`, with the norm over all but the tap dimension. Fusing
    replaces both by one parameter `weight`.
    """

    weight_v: nn.Parameter | None
    weight_g: nn.Parameter | None
    weight: nn.Parameter | None

    def __init__(self, dim: int, kernel: int, groups: int, causal: bool = False) -> None:
        super().__init__()
        self.groups, self.causal = groups, causal
        self.shape = (dim, dim // groups, kernel)
        self.weight_v = nn.Parameter(torch.empty(dim, dim // groups, kernel))
        self.weight_g = nn.Parameter(torch.empty(1, 1, kernel))
        self.register_parameter("weight", None)
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.normal_(self.weight_v, std=math.sqrt(4.0 / (kernel * dim)))
        with torch.no_grad():
            if not self.weight_g.is_meta:  # if only shapes are wanted: torch would import for seconds
                self.weight_g.copy_(torch.linalg.vector_norm(self.weight_v, dim=(0, 1), keepdim=True))

    def plain_weight(self) -> Tensor:
        """The normalized weight, (D, D / groups, k)."""
        if self.weight is not None:
            return self.weight
        assert self.weight_v is not None and self.weight_g is not None
        norm: Tensor = torch.linalg.vector_norm(self.weight_v, dim=(0, 1), keepdim=True)
        return self.weight_v * (self.weight_g / norm)

    def fold(self) -> PositionalConv1d:
        """Fold the weight normalization into the weight."""
        if self.weight_v is not None and self.weight_v.is_meta:  # only the shape: torch would import for seconds to infer that of a norm
            self.weight = nn.Parameter(self.weight_v.detach())
        else:
            self.weight = nn.Parameter(self.plain_weight())
        self.weight_v = self.weight_g = None
        return self

    def train(self, mode: bool = True) -> PositionalConv1d:
        """Set the mode and forget the spectrum, because optimizers may change weights without a trace."""
        _spectra.pop(self, None)
        return super().train(mode)

    def forward(self, x: Tensor, chunks: Chunks | None = None) -> Tensor:
        """Convolve; with `chunks`, a frame sees zeros beyond the end of its chunk."""
        kernel = self.shape[2]
        before, after = (kernel - 1, 0) if self.causal else (kernel // 2, (kernel - 1) // 2)
        if chunks is None and not self.training and takes_spectrum(x, self.shape):
            return self._convolve_blocks(x, before)
        weight = self.plain_weight()
        if chunks is None:
            return self._convolve(F.pad(x.transpose(1, 2), (before, after)), weight).transpose(1, 2)  # .mT has no ONNX form
        return chunks.convolved(self, x, before, after, lambda w: self._convolve(w.mT, weight).mT)[:, : x.size(1)]

    @counted_as("grouped convolution", _cost)
    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:  # (B, D, T + k - 1) -> (B, D, T)
        x, weight = with_zero_tap(x, weight)
        return F.conv1d(x, weight, self.bias, groups=self.groups)

    @counted_as("grouped convolution", _block_cost)
    def _convolve_blocks(self, x: Tensor, before: int) -> Tensor:  # (B, T, D) -> (B, T, D)
        y = convolve_blocks(x.float(), self._spectrum(), self.shape[2], before)
        return y.add_(self.bias).to(x.dtype)

    def _spectrum(self) -> Tensor:
        sources = [p for p in (self.weight, self.weight_v, self.weight_g) if p is not None]
        if torch.is_grad_enabled() and any(p.requires_grad for p in sources):
            return spectrum(self.plain_weight().float(), self.groups)
        key = tuple((id(p), p.data_ptr(), 0 if p.is_inference() else p._version, p.dtype) for p in sources)
        known = _spectra.get(self)
        if known is None or known[0] != key:
            known = _spectra[self] = key, spectrum(self.plain_weight().float(), self.groups)
        return known[1]


class PositionalEmbedding(nn.Sequential):
    """GELU of a `PositionalConv1d`, (B, T, D) -> (B, T, D). Children keep fairseq's numbers."""

    def __init__(self, dim: int, kernel: int, groups: int, causal: bool = False) -> None:
        super().__init__(PositionalConv1d(dim, kernel, groups, causal), nn.GELU())

    def forward(self, x: Tensor, chunks: Chunks | None = None) -> Tensor:
        return self[1](self[0](x, chunks))  # type: ignore[no-any-return]


def by_key(by_offset: Tensor) -> Tensor:
    """View (B, H, n, T) of (B, H, n, T + n - 1), whose row i has n - 1 - i columns before those of keys 0 ... T - 1."""
    batch, heads, n, span = by_offset.shape
    frames = span - n + 1
    if is_symbolic():  # graphs have no strides: slices and reshapes, of rows one longer, so that none is empty for one frame
        flat = F.pad(by_offset, (0, 1)).flatten(2)[:, :, n - 1 : n - 1 + n * span]
        return flat.view(batch, heads, n, span)[..., :frames]
    return by_offset.contiguous().as_strided((batch, heads, n, frames), (heads * n * span, n * span, span - 1, 1), n - 1)


def relative_sinusoids(frames: int, dim: int, like: Tensor) -> Tensor:
    """Sinusoids of the offsets T-1 .. -(T-1), (2T - 1, D), in the dtype and on the device of `like` (Transformer-XL, section 3.3)."""
    offsets = torch.arange(frames - 1, -frames, -1, device=like.device, dtype=torch.float32)
    rates = torch.exp(torch.arange(0, dim, 2, device=like.device, dtype=torch.float32) * (-math.log(10_000.0) / dim))
    angles = offsets[:, None] * rates  # (2T - 1, D / 2)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)[:, :dim].to(like.dtype)


def repeated(x: Tensor, rate: int, frames: int) -> Tensor:
    """Repeat each frame of x (B, T, C) `rate` times, and cut to `frames`."""
    if rate == 1:
        return x
    if is_exporting():  # torch.export would need a proof that this cuts
        return x.index_select(1, torch.arange(frames, device=x.device) // rate)
    return x.unsqueeze(2).expand(-1, -1, rate, -1).flatten(1, 2)[:, :frames]
