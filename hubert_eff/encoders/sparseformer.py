"""Sparseformer encoder: a Transformer with sparse attention (Child et al. 2019, "fixed" pattern), in HuBERT's post-LN layer."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from ..config import COUNT, NOT_NEGATIVE, HubertConfig, option
from ..errors import UserError
from ..layers.sparse import SparseSelfAttention
from ..layers.sparse_pattern import SparsePattern
from .base import DEBUG, DEEP_NARROW, SHALLOW_WIDE, Encoder
from .registry import register_encoder
from .transformer import TransformerBlock


@dataclass
class SparseformerConfig(HubertConfig):
    """A Sparseformer HuBERT; by default, stride and expressivity are those of fairseq's sparse attention."""

    sparse_pattern: str = option(
        "fixed",
        "the keys of a frame: its block of sparse_stride frames and the last sparse_expressivity frames of every block; the same with "
        "fairseq's shift and one more frame; or the frames up to sparse_window away",
        ("fixed", "fairseq", "local"),
    )
    sparse_stride: int = option(
        32, "length of a block, in frames; 0 is the cheapest: round(sqrt(sparse_expressivity * sparse_max_frames))", bounds=NOT_NEGATIVE
    )
    sparse_expressivity: int = option(8, "frames at the end of each block that all frames see", bounds=COUNT)
    sparse_max_frames: int = option(1500, "length of the input for which sparse_stride=0 finds the best stride, in frames", bounds=COUNT)
    sparse_window: int = option(64, "frames that a frame sees on each side with sparse_pattern=local", bounds=COUNT)
    flex_attention: bool = option(False, "use FlexAttention on a GPU if no attention probabilities are dropped; it compiles at first use")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparse_stride == 0:  # resolved here, so the value is saved with the model and never depends on a batch
            self.sparse_stride = self._automatic_stride()

    def _automatic_stride(self) -> int:
        """The stride l that minimizes the keys per frame, l - c + c T / l, for T = sparse_max_frames."""
        return round(math.sqrt(self.sparse_expressivity * self.sparse_max_frames))

    def validate(self) -> None:
        super().validate()
        if self.sparse_stride == 0 and self._automatic_stride() <= self.sparse_expressivity:
            raise UserError(
                f"sparse_max_frames={self.sparse_max_frames} is too short for blocks of more than sparse_expressivity="
                f"{self.sparse_expressivity} frames: raise it or set sparse_stride"
            )
        if 0 < self.sparse_stride <= self.sparse_expressivity:
            raise UserError(
                f"sparse_stride={self.sparse_stride} must be more than sparse_expressivity={self.sparse_expressivity}: "
                "a block needs more frames than all frames see of it"
            )


@register_encoder(
    "sparseformer",
    config=SparseformerConfig,
    presets={
        # deep and narrow, shallow and wide: both in the main paper's table 1
        "sparseformer-dn-s": DEEP_NARROW,
        "sparseformer-sw-s": SHALLOW_WIDE,
        "sparseformer-debug": {**DEBUG, "sparse_stride": 128},
    },
)
class SparseformerEncoder(Encoder):
    """Stack of `TransformerBlock` with `SparseSelfAttention`."""

    chunk_multiple = 1

    def __init__(self, config: HubertConfig) -> None:
        assert isinstance(config, SparseformerConfig)
        super().__init__(config)
        self.attention_block = None if config.sparse_pattern == "local" else config.sparse_stride

    def build_block(self, config: HubertConfig, index: int) -> nn.Module:
        assert isinstance(config, SparseformerConfig)
        pattern = SparsePattern(config.sparse_pattern, config.sparse_stride, config.sparse_expressivity, config.sparse_window)
        attention = SparseSelfAttention(
            config.encoder_embed_dim, config.encoder_attention_heads, config.attention_dropout, pattern, config.flex_attention
        )
        return TransformerBlock(config, attention)
