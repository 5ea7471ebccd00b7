"""Waveform extractors: strided convolutions from samples to 512 channels at 20 ms (wav2vec 2.0, section 2; SEW, section 4)."""

# B batch, S samples, T frames (of 20 ms at the end), C channels

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..config import LOUDEST, MEL_FRONTS, HubertConfig
from ..errors import UserError
from ..layers.activation import gelu
from ..layers.bits import Cost, counted_as
from ..layers.convolution import strided_conv
from ..layers.linear import takes_onednn
from ..layers.tracing import is_exporting, is_tracing
from .logmel import LogMelExtractor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # dtypes of audio; a model computes in the dtype of its weights


class ChannelNorm(nn.Sequential):
    """LayerNorm over the channels of (B, T, C). The affine parameters are named `1.`, as in fairseq."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Identity(), nn.LayerNorm(channels))


class _TimeNorm(torch.autograd.Function):
    """GroupNorm over time in the (B, T, C) layout, in which torch's own is slow, and inexact as a BatchNorm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        centered = x - x.mean(1, keepdim=True)
        scale = torch.rsqrt(centered.square().mean(1, keepdim=True) + eps)  # (B, 1, C)
        normed = centered.mul_(scale)
        ctx.save_for_backward(normed, scale, weight)
        return torch.addcmul(bias, normed, weight)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        normed, scale, weight = ctx.saved_tensors
        mean, slope = grad.mean(1, keepdim=True), (grad * normed).mean(1, keepdim=True)
        grad_x = torch.addcmul(grad - mean, normed, slope, value=-1).mul_(scale * weight)
        frames = grad.size(1)
        return grad_x, slope.sum((0, 1)) * frames, mean.sum((0, 1)) * frames, None


class TimeNorm(nn.GroupNorm):
    """GroupNorm with one group per channel: each channel of (B, T, C) is normalized over time.

    Without gradient the input, which nobody else may read, is overwritten, since memory for a second tensor costs more than the arithmetic.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    @counted_as("norm", lambda _, input: Cost(0, input.numel()))
    def forward(self, input: Tensor) -> Tensor:
        if takes_onednn(input, self.weight):
            if not torch.is_grad_enabled():  # the same arithmetic
                centered = input.sub_(input.mean(1, keepdim=True))
                normed = centered.mul_(torch.rsqrt(centered.square().mean(1, keepdim=True) + self.eps))
                return torch.addcmul(self.bias, normed, self.weight, out=normed)
            return _TimeNorm.apply(input, self.weight, self.bias, self.eps)  # type: ignore[no-any-return,no-untyped-call]
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


class ConvBlock(nn.Sequential):
    """Convolution, norm, GELU. Children have fairseq's numbers: 0 for the convolution, 2 for the norm."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, bias: bool, norm: nn.Module) -> None:
        conv = nn.Conv1d(channels, out, kernel, stride, bias=bias)
        nn.init.kaiming_normal_(conv.weight)
        super().__init__(conv, nn.Identity(), norm)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T', C')
        conv = self[0]
        assert isinstance(conv, nn.Conv1d)
        return gelu(self[2](strided_conv(x, conv.weight, conv.bias, conv.stride[0])))


class ConvFeatureExtractor(nn.Module):
    """Waveform (B, S) -> features (B, T, C), T = `num_frames(S)`.

    `extractor_mode` default: GroupNorm over time per channel on the first convolution (its statistics include padding, as in
    fairseq); layer_norm: LayerNorm over channels on every convolution (padding cannot reach a valid frame).
    """

    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        blocks, channels = [], 1
        for index, (out, kernel, stride) in enumerate(config.conv_layers):
            norm: nn.Module = nn.Identity()
            if config.extractor_mode == "layer_norm":
                norm = ChannelNorm(out)
            elif index == 0:
                norm = TimeNorm(out)
            blocks.append(ConvBlock(channels, out, kernel, stride, config.conv_bias, norm))
            channels = out
        self.conv_layers = nn.ModuleList(blocks)

    reach = (0, 0)  # samples that a frame reads before and after its own

    def forward(self, source: Tensor) -> Tensor:
        return self.of_padded(source)

    def of_padded(self, source: Tensor) -> Tensor:
        """Compute features of samples that already include `reach` neighbors on either side."""
        first = self.conv_layers[0][0]  # type: ignore[index]
        x = source.to(first.weight.dtype).unsqueeze(-1)  # audio is float32 for models of every dtype
        for block in self.conv_layers:
            x = block(x)
        return x


def num_frames(samples: Tensor | int, conv_layers: Sequence[tuple[int, int, int]]) -> Tensor | int:
    """Frames whose whole receptive field lies in the first `samples` samples: floor((S - 400) / 320) + 1 for both named extractors."""
    for _, kernel, stride in conv_layers:
        samples = (samples - kernel) // stride + 1
    return samples.clamp(min=0) if isinstance(samples, Tensor) else max(samples, 0)


def receptive_field(conv_layers: Sequence[tuple[int, int, int]]) -> int:
    """Samples that one frame of the extractor sees."""
    need = 1
    for _, kernel, stride in reversed(conv_layers):
        need = (need - 1) * stride + kernel
    return need


def check_audio(wav: Tensor, padding_mask: Tensor | None = None) -> None:
    """Raise `UserError` unless audio is (B, S) of a float dtype, and its padding (B, S) bool."""
    if not isinstance(wav, Tensor):
        raise UserError(f"audio must be a tensor (batch, samples), not a {type(wav).__name__}: convert it, e.g. by torch.from_numpy")
    if wav.dim() != 2 or wav.size(0) < 1:
        raise UserError(f"audio must be (batch, samples), not {tuple(wav.shape)}")
    if wav.layout is not torch.strided:
        raise UserError(f"audio must be a dense tensor, not {wav.layout}: convert it by wav.to_dense()")
    if wav.dtype not in FLOATS:
        raise UserError(f"audio must be float samples in [-1, 1], not {wav.dtype}: scale it, samples of 16 bits by wav.float() / 32768")
    if padding_mask is None:
        return
    if not isinstance(padding_mask, Tensor) or padding_mask.dtype != torch.bool:
        found = padding_mask.dtype if isinstance(padding_mask, Tensor) else f"a {type(padding_mask).__name__}"
        raise UserError(f"padding_mask must be a bool tensor, True for padding, not {found}")
    if padding_mask.shape != wav.shape:
        raise UserError(f"padding_mask {tuple(padding_mask.shape)} must have the shape of the audio {tuple(wav.shape)}")


def check_samples(wav: Tensor, padding_mask: Tensor | None = None, where: str = "row {row}") -> None:
    """Raise `UserError` for samples (B, S) that are not finite or beyond `LOUDEST`, except in padding, and for padding before a sample.

    Nothing is checked if there are no values yet: while a graph is traced or compiled, and on the meta device.
    """
    if type(wav) is not Tensor or wav.is_meta or is_tracing() or torch.compiler.is_compiling() or _is_capturing(wav):
        return
    values = wav.detach().float().cpu().numpy() if wav.requires_grad else wav.float().cpu().numpy()
    mask = None if padding_mask is None else padding_mask.cpu().numpy()
    if mask is not None and bool((mask[:, :-1] > mask[:, 1:]).any()):
        row = int((mask[:, :-1] > mask[:, 1:]).any(1).argmax())
        raise UserError(f"padding must stand at the end of a row, but row {row} has samples behind it: move them to its start")
    if values.size and max(float(values.max()), -float(values.min())) <= LOUDEST:  # false for NaN
        return
    for wrong, bad in (("not finite", ~np.isfinite(values)), ("not audio", np.abs(values) > LOUDEST)):
        bad = bad if mask is None else bad & ~mask
        if bad.any():
            row, place = (int(i) for i in np.argwhere(bad)[0])
            first = f"the first (sample {place} of {where.format(row=row)}) is {values[row, place]:g}"
            raise UserError(f"{int(bad.sum())} samples are {wrong}, {first}: they must be within -1 and 1")


def _is_capturing(wav: Tensor) -> bool:
    return wav.is_cuda and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


def frame_padding_mask(padding_mask: Tensor, frames: int, rule: str, conv_layers: Sequence[tuple[int, int, int]]) -> Tensor:
    """Padding of samples (B, S) -> padding of frames (B, T); True = padding, which must be at the end. `rule`: `valid_frames`."""
    if rule == "fairseq":  # a frame is padding if every sample of its equal share is
        if is_exporting():  # equal for padding at the end, without a view that would need a proof of an integer share
            starts = torch.arange(frames, device=padding_mask.device) * (padding_mask.size(1) // frames)
            return starts >= (~padding_mask).sum(1, keepdim=True)
        cut = padding_mask[:, : padding_mask.size(1) // frames * frames]
        return cut.view(padding_mask.size(0), frames, -1).all(-1)
    valid = num_frames((~padding_mask).sum(1), conv_layers)
    assert isinstance(valid, Tensor)
    return torch.arange(frames, device=padding_mask.device) >= valid[:, None]


def extractor_of(config: HubertConfig) -> ConvFeatureExtractor | LogMelExtractor:
    """The extractor that `conv_feature_layers` names."""
    return LogMelExtractor(config) if config.conv_feature_layers in MEL_FRONTS else ConvFeatureExtractor(config)
