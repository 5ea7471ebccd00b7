"""Grouped convolution over time with long kernels by the discrete Fourier transform: overlap-save with blocks of a fixed length.

A product of spectra costs C multiplications per output instead of C k for the convolution. A frame is computed from its own block alone,
and every product has the same number of rows, so no bit depends on the length of the input or on the rest of the batch.
"""

# B batch, T frames, D channels, G groups, C = D / G, k kernel, N = 2 k samples of a block, S = N - k + 1 frames of a block, F = N / 2 + 1

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 4  # blocks of a product; more would be idle for inputs of a few seconds, and fewer would read the weight's spectrum more often


def spectrum(weight: Tensor, groups: int) -> Tensor:
    """Weight (D, C, k), float32 -> (F G, C, C) complex: the matrix from inputs to outputs for each frequency and group."""
    outputs, _, kernel = weight.shape
    mirrored: Tensor = torch.fft.rfft(weight, n=2 * kernel).conj().resolve_conj()  # a layer's convolution is a correlation
    return mirrored.view(groups, outputs // groups, weight.size(1), -1).permute(3, 0, 2, 1).flatten(0, 1).contiguous()


def convolve_blocks(x: Tensor, by_frequency: Tensor, kernel: int, before: int) -> Tensor:
    """Convolve x (B, T, D) float32, with `before` zeros before it and kernel - 1 - before after it, by a `spectrum`: (B, T, D)."""
    batch, frames, dim = x.shape
    block, step = 2 * kernel, kernel + 1
    count = -(-frames // step)
    calls = -(-batch * count // ROWS)
    padded = F.pad(x, (0, 0, before, count * step + kernel - 1 - before - frames))
    blocks = padded.unfold(1, block, step).flatten(0, 1)  # (B n, D, N)
    blocks = F.pad(blocks, (0, 0, 0, 0, 0, calls * ROWS - batch * count))
    width, frequencies = by_frequency.size(1), kernel + 1
    groups = dim // width
    spectra = torch.fft.rfft(blocks).view(calls, ROWS, groups, width, frequencies)
    rows = spectra.permute(0, 4, 2, 1, 3).reshape(calls, frequencies * groups, ROWS, width)
    products = torch.stack([torch.bmm(part, by_frequency) for part in rows.unbind(0)])
    spectra = products.view(calls, frequencies, groups, ROWS, width).permute(0, 3, 2, 4, 1).reshape(calls * ROWS, dim, frequencies)
    y: Tensor = torch.fft.irfft(spectra, n=block)[: batch * count, :, :step]
    return y.view(batch, count, dim, step).transpose(2, 3).reshape(batch, count * step, dim)[:, :frames]
