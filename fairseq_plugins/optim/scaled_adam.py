"""fairseq's optimizer `scaled_adam`, for any model."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, List, Optional  # noqa: UP035  (fairseq reads the types of a dataclass by these names)

from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer, register_optimizer
from omegaconf import II
from torch import Tensor

from hubert_eff.errors import UserError
from hubert_eff.optim import ScaledAdam
from hubert_eff.optim.scaled_adam import FORMS

from ..runtime.stopping import one_line_errors

logger = logging.getLogger(__name__)


@dataclass
class FairseqScaledAdamConfig(FairseqDataclass):
    """Keys of `optimizer`; the learning rate is `optimization.lr`."""

    betas: List[float] = field(  # noqa: UP006
        default_factory=lambda: [0.9, 0.98], metadata={"help": "coefficients of the averages of the update and of the squared gradient"}
    )
    eps: float = field(default=1e-8, metadata={"help": "added to the root of the averaged squared gradient"})
    clipping_scale: Optional[float] = field(  # noqa: UP045
        default=2.0, metadata={"help": "gradients are clipped to this many times the median of the latest norms; null for no clipping"}
    )
    clipping_update_period: int = field(default=100, metadata={"help": "updates between two estimates of the median for clipping"})
    scalar_lr_scale: float = field(
        default=0.1, metadata={"help": "factor on the learning rate for the size of a tensor and for tensors of one element"}
    )
    scalar_max: float = field(default=10.0, metadata={"help": "bound of the absolute value of tensors of one element"})
    param_min_rms: float = field(default=1e-5, metadata={"help": "root mean square below which a tensor grows"})
    param_max_rms: float = field(default=3.0, metadata={"help": "root mean square above which no tensor grows"})
    size_update_period: int = field(default=4, metadata={"help": "updates between two updates of the scales of tensors"})
    form: str = field(
        default=FORMS[0],
        metadata={"help": "form of the algorithm: the authors' code, or the paper's Algorithm 1", "choices": list(FORMS)},
    )
    lr: List[float] = II("optimization.lr")  # noqa: UP006
    clip_norm: float = II("optimization.clip_norm")
    fp16: bool = II("common.fp16")
    memory_efficient_fp16: bool = II("common.memory_efficient_fp16")
    fp16_no_flatten_grads: bool = II("common.fp16_no_flatten_grads")


@register_optimizer("scaled_adam", dataclass=FairseqScaledAdamConfig)
class FairseqScaledAdam(FairseqOptimizer):
    """`hubert_eff.optim.ScaledAdam` with fairseq's interface."""

    def __init__(self, cfg: FairseqScaledAdamConfig, params: Iterable[Tensor]) -> None:
        super().__init__(cfg)
        with one_line_errors():
            if cfg.fp16 and not (cfg.memory_efficient_fp16 or cfg.fp16_no_flatten_grads):
                raise UserError("optimizer scaled_adam needs tensors one by one: with common.fp16 set common.fp16_no_flatten_grads=true")
            if cfg.clip_norm > 0 and cfg.clipping_scale is not None:
                logger.warning(
                    f"optimizer scaled_adam clips gradients by itself (clipping_scale={cfg.clipping_scale:g}): set "
                    f"optimization.clip_norm=0, not {cfg.clip_norm:g}"
                )
            self._optimizer = ScaledAdam(params, **self.optimizer_config)

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """The settings that the configuration decides, even against a checkpoint."""
        cfg = self.cfg
        return {
            "lr": cfg.lr[0],
            "betas": tuple(cfg.betas),
            "eps": cfg.eps,
            "clipping_scale": cfg.clipping_scale,
            "clipping_update_period": cfg.clipping_update_period,
            "scalar_lr_scale": cfg.scalar_lr_scale,
            "scalar_max": cfg.scalar_max,
            "param_min_rms": cfg.param_min_rms,
            "param_max_rms": cfg.param_max_rms,
            "size_update_period": cfg.size_update_period,
            "form": cfg.form,
        }
