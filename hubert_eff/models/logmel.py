"""Fronts with two-dimensional convolutions, down to 20 ms, on a log-mel spectrogram that the model computes from the waveform.

They replace HuBERT's waveform extractor, with the same frames and the same rule of valid frames. A frame's kernels reach beyond its 400
samples; before the first and after the last sample they see silence, and so they do on padding, which thus changes nothing.
"""

# B batch, S samples, M mel frames of 10 ms, T frames, C channels, F mel bins

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import MEL_FRONTS, RECEPTIVE_FIELD, SAMPLE_RATE, HubertConfig
from ..layers.activation import swoosh_l, swoosh_r
from ..layers.convolution import GroupedConv2d
from ..layers.linear import Linear
from ..layers.scaling import BiasNorm
from ..layers.tracing import is_tracing

BINS, WINDOW, HOP, FFT = 80, 400, 160, 512
FLOOR = 1e-10  # lower bound of the power in a bin, for silence


def mel_filters(bins: int = BINS, points: int = FFT, rate: int = SAMPLE_RATE) -> Tensor:
    """Make triangles of equal width on the HTK mel scale from 0 Hz to half the rate, (points / 2 + 1, bins)."""

    def mel(hertz: float) -> float:
        return 2595.0 * math.log10(1.0 + hertz / 700.0)

    corners = 700.0 * (10.0 ** (torch.linspace(0.0, mel(rate / 2), bins + 2, dtype=torch.float64) / 2595.0) - 1.0)
    hertz = torch.linspace(0.0, rate / 2, points // 2 + 1, dtype=torch.float64).unsqueeze(1)
    low, center, high = corners[:-2], corners[1:-1], corners[2:]
    return torch.minimum((hertz - low) / (center - low), (high - hertz) / (high - center)).clamp(min=0.0).float()


class LogMel(nn.Module):
    """Waveform (B, S) -> log-mel spectrogram (B, M, 80): 25 ms Hann windows every 10 ms, log10 of the power, shifted to about [-1, 2], in
    float32."""

    window: Tensor
    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)
        self.register_buffer("filters", mel_filters(), persistent=False)

    def forward(self, source: Tensor) -> Tensor:
        powers = self._traced_powers(source.float()) if is_tracing() else self._powers(source.float())
        return ((powers @ self.filters.float()).clamp(min=FLOOR).log10() + 4.0) / 4.0

    def _powers(self, source: Tensor) -> Tensor:  # (B, S) -> (B, M, 257)
        frames = source.unfold(1, WINDOW, HOP) * self.window.float()
        spectrum = torch.view_as_real(torch.fft.rfft(frames, FFT))  # (B, M, 257, 2)
        return spectrum.square().sum(-1)

    def _traced_powers(self, source: Tensor) -> Tensor:
        """The same by a strided convolution; traces have no sliding windows of dynamic length, few runtimes a Fourier transform."""
        waves = F.conv1d(source.unsqueeze(1), torch.from_numpy(windowed_waves()).unsqueeze(1), stride=HOP).square()  # (B, 514, M)
        cosines, sines = waves.chunk(2, 1)
        return (cosines + sines).transpose(1, 2)


@functools.cache
def windowed_waves() -> np.ndarray[Any, np.dtype[np.float32]]:
    """Cosines and then sines of the 257 frequencies times the window, (514, 400)."""
    time = np.arange(WINDOW)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * time / WINDOW)
    turns = np.outer(np.arange(FFT // 2 + 1), time) % FFT  # integers keep the angles exact
    angles = 2 * np.pi * turns / FFT
    waves: np.ndarray[Any, np.dtype[np.float32]] = (window * np.concatenate([np.cos(angles), np.sin(angles)])).astype(np.float32)
    return waves


class Subsampling(nn.Module):
    """Two 3 x 3 convolutions with ReLU and a linear layer: (B, M, 80) -> (B, T, D).

    The second convolution is full, as in the Conformer, or, if `separable`, depthwise and then pointwise, with (9 + C) / (9 C) of the MACs
    (Xu et al. 2024, section 3). `rates`: strides in time; (2, 2) is the Conformer's 40 ms, (2, 1) HuBERT's 20 ms.
    """

    def __init__(self, dim: int, separable: bool, rates: tuple[int, int] = (2, 1)) -> None:
        super().__init__()
        first, second = ((rate, 2) for rate in rates)
        self.conv1 = nn.Conv2d(1, dim, 3, first, padding=(0, 1))
        self.depthwise = GroupedConv2d(dim, dim, 3, second, padding=(0, 1), groups=dim) if separable else None
        self.conv2 = nn.Conv2d(dim, dim, 1) if separable else nn.Conv2d(dim, dim, 3, second, padding=(0, 1))
        self.linear = Linear(dim * BINS // 4, dim)

    def forward(self, mel: Tensor) -> Tensor:
        x = F.relu(self.conv1(mel.unsqueeze(1)))  # (B, C, M', 40)
        if self.depthwise is not None:
            x = self.depthwise(x)
        x = F.relu(self.conv2(x))  # (B, C, T, 20)
        return self.linear(x.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class ConvEmbed(nn.Module):
    """Zipformer's front (section 3.1): three convolutions to 8, 32, 128 channels, ConvNeXt layer, linear layer; (B, M, 80) -> (B, T, D).

    Their strides in time x frequency are 1x2, 2x2, 1x2, which leaves 10 of 80 bins; HuBERT's LayerNorm after the extractor replaces the
    BiasNorm. In the authors' code (`authors`), which has the paper's sizes and FLOP, the first stride is 1x1, the others see no zeros
    beyond the bins, 19 bins are left, and the BiasNorm is present.
    """

    def __init__(self, dim: int, authors: bool = False) -> None:
        super().__init__()
        first, bins = ((1, 1), 19) if authors else ((1, 2), BINS // 8)
        padding = ((0, 1), (0, 0), (0, 0)) if authors else ((0, 1),) * 3
        widths = zip((1, 8, 32), (8, 32, 128), (first, (2, 2), (1, 2)), padding, strict=True)
        self.convs = nn.ModuleList([nn.Conv2d(c, n, 3, stride, padding=pad) for c, n, stride, pad in widths])
        self.depthwise = GroupedConv2d(128, 128, 7, padding=(0, 3), groups=128)
        self.pointwise1 = nn.Conv2d(128, 384, 1)
        self.pointwise2 = nn.Conv2d(384, 128, 1)
        self.linear = Linear(128 * bins, dim)
        self.norm = BiasNorm(dim) if authors else None

    def forward(self, mel: Tensor) -> Tensor:
        x = mel.unsqueeze(1)
        for conv in self.convs:
            x = swoosh_r(conv(x))
        reach = self.depthwise.kernel_size[0] // 2
        x = x[:, :, reach : x.size(2) - reach] + self.pointwise2(swoosh_l(self.pointwise1(self.depthwise(x))))
        y: Tensor = self.linear(x.transpose(1, 2).flatten(2))
        return y if self.norm is None else self.norm(y)


# mel frames that a frame sees, by front: 1 plus the extent of each kernel
MEL_FRAMES = {"logmel-conv": 1 + 2 + 4, "logmel-dws": 1 + 2 + 4, "conv-embed": 1 + 2 + 2 + 4 + 12}


class LogMelExtractor(nn.Module):
    """Waveform (B, S) -> features (B, T, D), T that of HuBERT's extractor; frame t is centered at the same sample, 320 t + 200."""

    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        front, dim = config.conv_feature_layers, config.input_dim
        assert front in MEL_FRONTS
        beyond = WINDOW + (MEL_FRAMES[front] - 1) * HOP - RECEPTIVE_FIELD
        self.reach = (beyond // 2, beyond // 2)
        self.mel = LogMel()
        embeds, authors = front == "conv-embed", config.conv_embed == "authors"
        self.front = ConvEmbed(dim, authors) if embeds else Subsampling(dim, separable=front == "logmel-dws")

    def forward(self, source: Tensor, masked: Tensor | None = None) -> Tensor:
        """Waveform (B, S) -> (B, T, D); masked (B, M, 80) bool: the bins of the spectrogram to set to 0, its mean; M = `mel_frames(S)`."""
        return self.of_padded(F.pad(source, self.reach), masked)

    def of_padded(self, source: Tensor, masked: Tensor | None = None) -> Tensor:
        """Of samples with their neighbors, `reach` many on either side, there already."""
        mel = self.mel(source)
        if masked is not None:
            mel = mel.masked_fill(masked, 0.0)
        return self.front(mel.to(self.front.linear.weight.dtype))  # type: ignore[no-any-return]

    def mel_frames(self, samples: int) -> int:
        """Number of spectrogram frames of 10 ms for so many samples."""
        return (samples + sum(self.reach) - WINDOW) // HOP + 1
