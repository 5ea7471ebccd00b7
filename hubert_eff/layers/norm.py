"""Normalization that respects padding."""

# B batch, T frames, C channels

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch import distributed as dist

from .precision import wide

_counted = True


@contextmanager
def _untracked(module: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.data.copy_(value)  # hidden from autograd: a norm in training saves them for its backward pass, but does not read them


def once_tracked(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of `torch.utils.checkpoint`: running statistics are updated in the forward pass, not again when it is recomputed.

    They are restored rather than left alone, so that a compiled block is recomputed by the same code as in its forward pass.
    """
    return nullcontext(), _untracked(module)


@contextmanager
def left_out() -> Iterator[None]:
    """Exclude batches inside from the statistics of this and all other processes: they stand in for batches that do not exist."""
    global _counted
    _counted = False
    try:
        yield
    finally:
        _counted = True


class NoNorm(nn.Module):
    """Replaces a norm."""

    def forward(self, input: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return `input` unchanged."""
        return input


class FrameNorm(nn.LayerNorm):
    """LayerNorm of each frame, called like norms that need to know which frames are valid."""

    def forward(self, input: Tensor, valid: Tensor | None = None) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        return super().forward(input)


class MaskedBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the valid frames of (B, T, C), with statistics shared by all data-parallel processes.

    In training it equals `nn.BatchNorm1d` on the packed valid frames of the joint batch. Batch statistics are float32 at
    least; running ones have the dtype of the module.
    """

    def forward(self, input: Tensor, valid: Tensor | None = None) -> Tensor:
        """Normalize. `valid`: (B, T) bool, None = all. The output on padding is undefined."""
        x = input
        rows = x.reshape(-1, x.size(-1))
        if not self.training:
            return super().forward(rows).view_as(x)
        joint = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        alone = not joint and _counted
        if alone and valid is None and len(rows) > 1:
            return super().forward(rows).view_as(x)
        if alone and valid is not None and x.device.type == "cpu" and not torch.compiler.is_compiling():
            index = valid.reshape(-1).nonzero().squeeze(1)  # on a GPU this would wait for all queued work
            if len(index) > 1:
                packed = super().forward(rows.index_select(0, index))
                return packed.new_zeros(rows.shape).index_copy(0, index, packed).view_as(x)
        values = wide(x)
        weight = (values.new_ones(x.shape[:2]) if valid is None else valid.to(values.dtype)).unsqueeze(-1)
        if joint and not _counted:
            weight = torch.zeros_like(weight)
        total = torch.cat(((values * weight).sum((0, 1)), weight.sum().view(1)))
        total = _sum_over_processes(total) if joint else total
        count = total[-1].detach().clamp(min=1.0)
        mean = total[:-1] / count
        square = ((values - mean).square() * weight).sum((0, 1))
        variance = (_sum_over_processes(square) if joint else square) / count
        if joint and not _counted:  # if all processes exclude theirs, the running statistics are used and stay
            assert self.running_mean is not None and self.running_var is not None
            seen = total[-1] > 0
            mean = torch.where(seen, mean, self.running_mean.to(mean.dtype))
            variance = torch.where(seen, variance, self.running_var.to(mean.dtype))
        if joint or _counted:
            self._track(mean.detach(), variance.detach() * count / (count - 1).clamp(min=1.0))
        y = (values - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias
        return y.to(x.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        rate = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
        self.running_var.lerp_(variance.to(self.running_var.dtype), rate)


_NORMS = {"layer_norm": FrameNorm, "batch_norm": MaskedBatchNorm}
NORMS = (*_NORMS, "none")


def norm_of(kind: str, dim: int) -> nn.Module:
    """A norm of (B, T, dim), called as norm(x, valid); kind: one of `NORMS`."""
    return _NORMS[kind](dim) if kind in _NORMS else NoNorm()


def _sum_over_processes(x: Tensor) -> Tensor:
    from torch.distributed.nn.functional import all_reduce  # the differentiable one

    return all_reduce(x)  # type: ignore[no-any-return,no-untyped-call]
