"""fairseq's learning rate schedule `eden`, for any optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import List  # noqa: UP035  (fairseq reads the types of a dataclass by these names)

from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer
from fairseq.optim.lr_scheduler import FairseqLRScheduler, register_lr_scheduler
from omegaconf import II

from hubert_eff.errors import UserError
from hubert_eff.optim import eden

from ..runtime.stopping import one_line_errors


@dataclass
class EdenConfig(FairseqDataclass):
    """Keys of `lr_scheduler`; the base rate is `optimization.lr`. Defaults are those of self-supervised training, with a rate of 0.045."""

    lr_batches: float = field(default=7500.0, metadata={"help": "updates after which the rate begins to fall"})
    lr_epochs: float = field(default=10.5, metadata={"help": "epochs after which the rate begins to fall a second time"})
    warmup_batches: int = field(default=5000, metadata={"help": "updates of the linear warm-up"})
    warmup_start: float = field(default=0.0, metadata={"help": "share of the rate at which the warm-up starts"})
    lr: List[float] = II("optimization.lr")  # noqa: UP006


@register_lr_scheduler("eden", dataclass=EdenConfig)
class FairseqEden(FairseqLRScheduler):
    """`hubert_eff.optim.eden` of the number of updates and of finished epochs."""

    def __init__(self, cfg: EdenConfig, optimizer: FairseqOptimizer) -> None:
        super().__init__(cfg, optimizer)
        with one_line_errors():
            if len(cfg.lr) != 1:
                raise UserError(f"lr_scheduler eden takes one base rate, not optimization.lr={list(cfg.lr)}: give a list of one number")
            for name in ("lr_batches", "lr_epochs"):
                if getattr(cfg, name) <= 0:
                    raise UserError(f"lr_scheduler.{name}={getattr(cfg, name)} must be positive")
            if cfg.warmup_batches < 0 or not 0.0 <= cfg.warmup_start <= 1.0:
                raise UserError(
                    f"lr_scheduler.warmup_batches={cfg.warmup_batches} must not be negative, and "
                    f"lr_scheduler.warmup_start={cfg.warmup_start} must be in [0, 1]"
                )
        self.finished = 0  # epochs
        self.step_update(0)

    def step_begin_epoch(self, epoch: int) -> None:
        """Set the epoch; fairseq counts from 1 and calls this at the start of each epoch, and when a run resumes."""
        self.finished = epoch - 1

    def step_update(self, num_updates: int) -> float:
        """Set and return the rate of the next update."""
        cfg = self.cfg
        lr = eden(num_updates, self.finished, cfg.lr[0], cfg.lr_batches, cfg.lr_epochs, cfg.warmup_batches, cfg.warmup_start)
        self.optimizer.set_lr(lr)
        return lr
