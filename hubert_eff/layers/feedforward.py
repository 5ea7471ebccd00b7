"""Feed-forward modules."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from .activation import silu
from .dropout import Dropout
from .folding import fold_before
from .grid import grid_norm, pointwise
from .kinds import FEED_FORWARD, Kind
from .linear import Linear
from .norm import norm_of


class ConformerFeedForward(nn.Module):
    """LayerNorm (or another norm, or none), Linear D -> F, SiLU, Linear F -> D (Conformer, section 2.3)."""

    def __init__(self, dim: int, inner: int, dropout: float, activation_dropout: float, norm: str = "layer_norm") -> None:
        super().__init__()
        self.layer_norm = norm_of(norm, dim)
        self.w_1 = Linear(dim, inner)
        self.w_2 = Linear(inner, dim)
        self.activation = silu
        self.activation_dropout = Dropout(activation_dropout)
        self.dropout = Dropout(dropout)

    def fold(self) -> ConformerFeedForward:
        """Fold a BatchNorm into the layer that reads it."""
        self.layer_norm = fold_before(self.layer_norm, self.w_1)
        return self

    def channels_first(self) -> nn.Module:
        """Build the channels-first twin (`layers.grid`)."""
        return nn.Sequential(grid_norm(self.layer_norm), pointwise(self.w_1), nn.SiLU(), pointwise(self.w_2))

    def kinds(self) -> Mapping[str, Kind]:
        """Declare the kinds of the parts (`layers.kinds.Declared`)."""
        return {"w_1": Kind(FEED_FORWARD), "w_2": Kind(FEED_FORWARD, signed=False, activation="activation")}

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """x (B, T, D), valid (B, T) -> (B, T, D)."""
        x = self.activation_dropout(self.activation(self.w_1(self.layer_norm(x, valid))))
        return self.dropout(self.w_2(x))  # type: ignore[no-any-return]
