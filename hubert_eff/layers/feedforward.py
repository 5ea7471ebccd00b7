"""Feed-forward modules."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .dropout import Dropout
from .linear import Linear


class ConformerFeedForward(nn.Module):
    """LayerNorm, Linear D -> F, SiLU, Linear F -> D (Conformer, section 2.3)."""

    def __init__(self, dim: int, inner: int, dropout: float, activation_dropout: float) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(dim)
        self.w_1 = Linear(dim, inner)
        self.w_2 = Linear(inner, dim)
        self.activation_dropout = Dropout(activation_dropout)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation_dropout(F.silu(self.w_1(self.layer_norm(x))))
        return self.dropout(self.w_2(x))  # type: ignore[no-any-return]
