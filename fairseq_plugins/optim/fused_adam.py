"""fairseq's optimizer `fused_adam`: its `adam` in one kernel for all tensors."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, List  # noqa: UP035  (fairseq reads the types of a dataclass by these names)

from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer, register_optimizer
from omegaconf import II
from torch import Tensor

from hubert_eff.errors import UserError
from hubert_eff.optim import FusedAdam

from ..runtime.stopping import one_line_errors


@dataclass
class FairseqFusedAdamConfig(FairseqDataclass):
    """Keys of fairseq's `adam`, so only `optimizer._name=fused_adam` needs to change."""

    adam_betas: Any = field(default="(0.9, 0.999)", metadata={"help": "coefficients of the averages of gradient and squared gradient"})
    adam_eps: float = field(default=1e-8, metadata={"help": "added to the root of the averaged squared gradient"})
    weight_decay: float = field(
        default=0.0, metadata={"help": "share of the weights, times the learning rate, that every update subtracts"}
    )
    lr: List[float] = II("optimization.lr")  # noqa: UP006


@register_optimizer("fused_adam", dataclass=FairseqFusedAdamConfig)
class FairseqFusedAdam(FairseqOptimizer):
    """`hubert_eff.optim.FusedAdam` with fairseq's interface."""

    def __init__(self, cfg: FairseqFusedAdamConfig, params: Iterable[Tensor]) -> None:
        super().__init__(cfg)
        with one_line_errors():
            self._optimizer = FusedAdam(params, **self.optimizer_config)

    @property
    def supports_flat_params(self) -> bool:
        """Whether all weights may come as one tensor, as fairseq passes them with fp16."""
        return True

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """The settings that the configuration decides, even against a checkpoint."""
        cfg = self.cfg
        return {"lr": cfg.lr[0], "betas": _pair(cfg.adam_betas), "plain_eps": cfg.adam_eps, "weight_decay": cfg.weight_decay}


def _pair(betas: Any) -> tuple[float, float]:
    """`adam_betas` as fairseq's configurations write it: text such as (0.9,0.98), or a list."""
    try:
        first, second = (float(beta) for beta in (ast.literal_eval(betas) if isinstance(betas, str) else betas))
    except (ValueError, TypeError, SyntaxError) as error:
        raise UserError(f"optimizer.adam_betas={betas!r} must be two numbers, such as (0.9,0.98)") from error
    return first, second
