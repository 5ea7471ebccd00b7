"""Waveform extractors: strided convolutions from samples to 512 channels at 20 ms (wav2vec 2.0, section 2; SEW, section 4)."""

# B batch, S samples, C channels, T frames of 20 ms

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import HubertConfig


class ChannelNorm(nn.Sequential):
    """LayerNorm over the channels of (B, C, T). The affine parameters sit at `1.`, as in fairseq's state names."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Identity(), nn.LayerNorm(channels))

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self[1](x.transpose(1, 2))
        return normed.transpose(1, 2)


class ConvBlock(nn.Sequential):
    """Convolution, norm, GELU. Children keep fairseq's numbers: 0 convolution, 2 norm."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, bias: bool, norm: nn.Module) -> None:
        conv = nn.Conv1d(channels, out, kernel, stride, bias=bias)
        nn.init.kaiming_normal_(conv.weight)
        super().__init__(conv, nn.Identity(), norm)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, T) -> (B, C', T')
        conv = self[0]
        assert isinstance(conv, nn.Conv1d)
        if conv.kernel_size == (1,) and conv.stride == (1,):  # Conv1d takes a slow path for these
            x = torch.matmul(conv.weight.squeeze(-1), x)
            x = x if conv.bias is None else x + conv.bias[:, None]
        else:
            x = conv(x)
        return F.gelu(self[2](x))


class ConvFeatureExtractor(nn.Module):
    """Waveform (B, S) -> features (B, C, T), T = `num_frames(S)`.

    `extractor_mode` default: GroupNorm over time per channel on the first convolution (its statistics include padding, as in fairseq);
    layer_norm: LayerNorm over channels on every convolution (padding cannot reach a valid frame).
    """

    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        blocks, channels = [], 1
        for index, (out, kernel, stride) in enumerate(config.conv_layers):
            norm: nn.Module = nn.Identity()
            if config.extractor_mode == "layer_norm":
                norm = ChannelNorm(out)
            elif index == 0:
                norm = nn.GroupNorm(out, out)
            blocks.append(ConvBlock(channels, out, kernel, stride, config.conv_bias, norm))
            channels = out
        self.conv_layers = nn.ModuleList(blocks)

    def forward(self, source: Tensor) -> Tensor:
        x = source.unsqueeze(1)
        for block in self.conv_layers:
            x = block(x)
        return x


def num_frames(samples: Tensor | int, conv_layers: Sequence[tuple[int, int, int]]) -> Tensor | int:
    """Frames whose whole receptive field lies in the first `samples` samples: floor((S - 400) / 320) + 1 for both named extractors."""
    for _, kernel, stride in conv_layers:
        samples = (samples - kernel) // stride + 1
    return samples.clamp(min=0) if isinstance(samples, Tensor) else max(samples, 0)


def frame_padding_mask(padding_mask: Tensor, frames: int, config: HubertConfig) -> Tensor:
    """Padding of samples (B, S) -> padding of frames (B, T); True = padding, which must stand at the end."""
    if config.valid_frames == "fairseq":  # a frame is padding when every sample of its equal share is
        cut = padding_mask[:, : padding_mask.size(1) // frames * frames]
        return cut.view(padding_mask.size(0), frames, -1).all(-1)
    valid = num_frames((~padding_mask).sum(1), config.conv_layers)
    assert isinstance(valid, Tensor)
    return torch.arange(frames, device=padding_mask.device) >= valid[:, None]
