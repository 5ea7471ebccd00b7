"""fairseq's learning rate schedule `noam`, for any optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import List  # noqa: UP035  (fairseq reads the types of a dataclass by these names)

from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer
from fairseq.optim.lr_scheduler import FairseqLRScheduler, register_lr_scheduler
from omegaconf import II

from hubert_eff.errors import UserError
from hubert_eff.optim import noam

from ..runtime.stopping import one_line_errors


@dataclass
class NoamConfig(FairseqDataclass):
    """Keys of `lr_scheduler`; the peak is `optimization.lr`."""

    warmup_updates: int = field(default=25_000, metadata={"help": "updates of the linear warm-up, at the end of which the rate peaks"})
    lr: List[float] = II("optimization.lr")  # noqa: UP006


@register_lr_scheduler("noam", dataclass=NoamConfig)
class FairseqNoam(FairseqLRScheduler):
    """`hubert_eff.optim.noam` of the number of the next update."""

    def __init__(self, cfg: NoamConfig, optimizer: FairseqOptimizer) -> None:
        super().__init__(cfg, optimizer)
        with one_line_errors():
            if len(cfg.lr) != 1:
                raise UserError(f"lr_scheduler noam takes one peak rate, not optimization.lr={list(cfg.lr)}: give a list of one number")
            if cfg.warmup_updates < 1:
                raise UserError(f"lr_scheduler.warmup_updates={cfg.warmup_updates} must be at least 1: the rate peaks at its end")
        self.step_update(0)

    def step_update(self, num_updates: int) -> float:
        """Set and return the rate of the update after `num_updates`."""
        lr = noam(num_updates + 1, self.cfg.lr[0], self.cfg.warmup_updates)
        self.optimizer.set_lr(lr)
        return lr
