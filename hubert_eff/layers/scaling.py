"""Keeps activations and parameters of a Zipformer in range: BiasNorm, and modules that change only gradients.

The gradient modifiers do nothing in eval mode. In training each works on a random share of the batches; the draws come from torch's
generators, so they repeat under `torch.manual_seed` and in activation checkpointing. They only scale or add to existing gradients, so
data-parallel processes may draw differently.
"""

# B batch, T frames, C channels, M = B T rows

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .precision import wide

TINY = 1e-20


@dataclass(frozen=True)
class Schedule:
    """A value that is linear between (update, value) points and constant outside them.

    `unset` is the value of a module that was never told the update; by default that of the last point, as at the end of training.
    """

    points: tuple[tuple[float, float], ...]
    unset: float | None = None

    def at(self, update: int | None) -> float:
        """The value after `update` updates."""
        points = self.points
        if update is None:
            return points[-1][1] if self.unset is None else self.unset
        if update <= points[0][0]:
            return points[0][1]
        for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
            if update < x1:
                return y0 + (y1 - y0) * (update - x0) / (x1 - x0)
        return points[-1][1]


class Scheduled(nn.Module):
    """A module with values that depend on the number of updates; the trainer sets `update`."""

    update: int | None = None

    def now(self, value: Schedule | float) -> float:
        """A schedule's current value."""
        return value.at(self.update) if isinstance(value, Schedule) else value


def chance(rate: float) -> bool:
    """True with probability `rate`; drawn on the CPU, so nothing waits for an accelerator."""
    return rate > 0.0 and float(torch.rand((), device="cpu")) < rate


# -- limits on parameters and values -----------------------------------------------------------------------------------------


class _LimitParameter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limits = low, high
        return x.view_as(x)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        low, high = ctx.limits
        outwards = ((x < low) & (grad > 0)) | ((x > high) & (grad < 0))
        return torch.where(outwards, -grad, grad), None, None


def limit_parameter(x: Tensor, low: float, high: float) -> Tensor:
    """Return x; outside [low, high], a gradient whose descent would lead farther out changes its sign."""
    return _LimitParameter.apply(x, low, high)  # type: ignore[no-any-return,no-untyped-call]


LIMIT_RATE = 0.6  # share of the batches in which limits of parameters act


# -- BiasNorm -----------------------------------------------------------------------------------------------------------------


def _bias_norm(x: Tensor, bias: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The normalized x, and 1 / RMS(x - b) of each frame."""
    values = wide(x)
    rate = (values - bias).square_().mean(-1, keepdim=True).clamp_min_(1e-30).rsqrt_()  # keeps a frame that equals the bias finite
    return (values * (rate * log_scale.to(values.dtype).exp())).to(x.dtype), rate


class _BiasNorm(torch.autograd.Function):
    """Saves its input and one number per frame."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, log_scale: Tensor) -> Tensor:
        y, rate = _bias_norm(x, bias, log_scale)
        ctx.save_for_backward(x, bias, log_scale, rate)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, bias, log_scale, rate = ctx.saved_tensors
        values, grad = x.to(rate.dtype), grad.to(rate.dtype)
        scale = rate * log_scale.to(rate.dtype).exp()
        along = (grad * values).sum(-1, keepdim=True) * scale  # per frame: sum of gradient times output
        pull = (values - bias).mul_(along * rate.square() / x.size(-1))
        grad_x = (grad * scale).sub_(pull).to(x.dtype)
        return grad_x, pull.flatten(0, -2).sum(0).to(bias.dtype), along.sum().to(log_scale.dtype)


class BiasNorm(nn.Module):
    """x exp(gamma) / RMS(x - b) over the channels, without an epsilon (Zipformer, equation 2); (..., C) -> (..., C).

    Computed in float32 at least. In training gamma's gradient keeps it within +-1.5.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.empty(dim).normal_(std=1e-4))

    def forward(self, x: Tensor) -> Tensor:
        log_scale: Tensor = self.log_scale
        if self.training and chance(LIMIT_RATE):
            log_scale = limit_parameter(log_scale, -1.5, 1.5)
        if not torch.is_grad_enabled():
            return _bias_norm(x, self.bias, log_scale)[0]
        return _BiasNorm.apply(x, self.bias, log_scale)  # type: ignore[no-any-return,no-untyped-call]


# -- Balancer -----------------------------------------------------------------------------------------------------------------


def _rows(x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """x (..., C) as wide rows (M, C), zero on padding, and the weight of each row in a mean, (M,)."""
    rows = wide(x.reshape(-1, x.size(-1)))
    if valid is None:
        return rows, rows.new_full((rows.size(0),), 1.0 / max(rows.size(0), 1))
    kept = valid.reshape(-1)
    return rows.masked_fill(~kept.unsqueeze(1), 0.0), kept.to(rows.dtype) / kept.sum().clamp(min=1)


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, valid: Tensor | None, means: tuple[float, float], rmss: tuple[float, float], scale: float) -> Tensor:
        ctx.save_for_backward(x, valid)
        ctx.bounds = means, rmss, scale
        return x.view_as(x)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        x, valid = ctx.saved_tensors
        means, rmss, scale = ctx.bounds
        rows, weight = _rows(x, valid)
        with torch.autocast(x.device.type, enabled=False):  # which would multiply in half precision
            mean, square = weight @ rows, weight @ rows.square()
        variance = square - mean.square()
        spread = variance > TINY
        square, std = square.clamp(min=TINY), variance.clamp(min=TINY).sqrt()
        ratio, rms = mean / std, square.sqrt()
        # which bounds are violated, and on which side
        ratio_sign = (ratio - ratio.clamp(*means)).sign()
        rms_sign = (rms - rms.clamp(*rmss)).sign()
        # the derivative of |ratio - bound| + |log(rms / bound)| by x is (level + slope (x - mean) / std) / (std M)
        level = ratio_sign + rms_sign * mean * std / square
        slope = (rms_sign * std.square() / square - ratio_sign * ratio) * spread
        factor = scale / (level.square() + slope.square()).sqrt().clamp(min=TINY)  # rms over the frames
        per_x = slope / std * factor
        flat = grad.reshape(rows.shape)
        pushed = torch.addcmul(level * factor - mean * per_x, rows, per_x).mul_(flat.abs()).add_(flat)
        return pushed.to(grad.dtype).view(grad.shape), None, None, None, None


BALANCER_RATE = Schedule(((0, 0.5), (8_000, 0.125)))


class Balancer(Scheduled):
    """Pushes each channel of (B, T, C) into bounds, in units of |gradient| (Zipformer, appendix A.3.1).

    The bounds are on the share of positive values, by mean / standard deviation, and on the mean absolute value, by the rms, both as if
    values were normal. Padding is not counted.
    """

    SCALE = 0.04  # rms over the frames of the push, relative to |gradient|

    def __init__(
        self,
        positive: tuple[Schedule | float, Schedule | float],
        absolute: tuple[Schedule | float, Schedule | float],
        rate: Schedule | float = BALANCER_RATE,
    ) -> None:
        super().__init__()
        self.positive, self.absolute, self.rate = positive, absolute, rate

    def bounds(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Current bounds on mean / deviation and on the rms."""
        low, high = (self.now(bound) for bound in self.positive)
        small, large = (self.now(bound) * math.sqrt(math.pi / 2) for bound in self.absolute)
        return (_mean_of_share(low), _mean_of_share(high)), (small, large)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """valid: (B, T) bool, None = all."""
        if not (self.training and x.requires_grad and torch.is_grad_enabled() and chance(self.now(self.rate))):
            return x
        return _Balance.apply(x, valid, *self.bounds(), self.SCALE)  # type: ignore[no-any-return,no-untyped-call]


def _mean_of_share(share: float, eps: float = 1e-10) -> float:
    """mean / deviation of values with a `share` of positive ones: about sqrt(2) times the inverse error function of 2 share - 1."""
    return 0.8139535143 * math.atanh(min(max(2 * share - 1, eps - 1), 1 - eps))


# -- Whitener -----------------------------------------------------------------------------------------------------------------


def _covariance(x: Tensor, valid: Tensor | None, groups: int) -> tuple[Tensor, Tensor]:
    """Centered rows (G, M, C / G), zero on padding, and their products (G, C / G, C / G)."""
    rows, weight = _rows(x, valid)
    with torch.autocast(x.device.type, enabled=False):  # which would multiply in half precision
        centered = rows - weight @ rows
        if valid is not None:
            centered = centered.masked_fill(~valid.reshape(-1, 1), 0.0)
        centered = centered.view(rows.size(0), groups, -1).transpose(0, 1)
        return centered, centered.mT @ centered


def _moments(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean square of a covariance's eigenvalues and their mean, over all groups."""
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    return covariance.square().sum() / diagonal.numel(), diagonal.mean()


def whitening_metric(x: Tensor, valid: Tensor | None = None, groups: int = 1) -> Tensor:
    """Mean square over squared mean of the eigenvalues of x's (B, T, C) covariance: 1 if white, at most C / groups."""
    square, mean = _moments(_covariance(x, valid, groups)[1])
    return square / mean.square().clamp(min=TINY)


class _Whiten(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, valid: Tensor | None, whitener: Whitener) -> Tensor:
        ctx.save_for_backward(x, valid)
        ctx.whitener, ctx.limit = whitener, whitener.now(whitener.limit)
        return x.view_as(x)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, valid = ctx.saved_tensors
        centered, covariance = _covariance(x, valid, ctx.whitener.groups)
        square, mean = _moments(covariance)
        if square < ctx.limit * mean.square().clamp(min=TINY):
            ctx.whitener.rate = ctx.whitener.RATES[0]
            return grad, None, None
        ctx.whitener.rate = ctx.whitener.RATES[1]
        # direction of the metric's derivative; its length follows from that of the gradient
        with torch.autocast(x.device.type, enabled=False):
            push = (centered @ covariance).sub_(centered * (square / mean.clamp(min=TINY)))
        flat = wide(grad)
        factor = ctx.whitener.scale * flat.norm() / push.norm().clamp(min=TINY)
        return (flat + push.transpose(0, 1).reshape(grad.shape) * factor).to(grad.dtype), None, None


class Whitener(Scheduled):
    """Pushes x (B, T, C) toward white by the gradient while `whitening_metric` is above a limit (Zipformer, appendix A.3.2).

    Padding is not counted. After a batch below the limit it works on fewer batches. As in the authors' code, that is not part of the state,
    so a run that resumes from a checkpoint starts with the higher share.
    """

    RATES = 0.025, 0.25  # shares of the batches below and above the limit

    def __init__(self, limit: Schedule | float, scale: float, groups: int = 1) -> None:
        super().__init__()
        self.limit, self.scale, self.groups = limit, scale, groups
        self.rate = self.RATES[1]

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """valid: (B, T) bool, None = all."""
        if not (self.training and x.requires_grad and torch.is_grad_enabled() and chance(self.rate)):
            return x
        return _Whiten.apply(x, valid, self)  # type: ignore[no-any-return,no-untyped-call]
