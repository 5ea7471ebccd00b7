"""`Encoder`, the base of all encoders: positions, the stack of blocks, padding and hidden states.

To add an encoder, write one module: a config dataclass, an `Encoder` with `build_block`, and `@register_encoder`.
"""

# B batch, T frames, D model dim

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..config import HubertConfig
from ..errors import UserError
from ..layers.chunks import Chunks
from ..layers.chunks import Frames as Frames
from ..layers.compiling import call_block, compiled_call
from ..layers.dropout import Dropout
from ..layers.kinds import POSITIONAL_CONV, Kind
from ..layers.norm import once_tracked
from ..layers.position import PositionalEmbedding
from ..layers.tracing import is_exporting, is_symbolic

# keys that presets of all encoders share
HUBERT_BASE = {  # keys of HuBERT-base that differ from fairseq's defaults (Hsu et al. 2021, section IV-C)
    "final_dim": 256,
    "untie_final_proj": True,
    "mask_prob": 0.8,
    "encoder_layerdrop": 0.05,
    "dropout_input": 0.1,
    "feature_grad_mult": 0.1,
}
DEEP_NARROW = {  # this and SHALLOW_WIDE are Sparseformer-DN-S and -SW-S of Table 1 of "Attention or Convolution" (Jeon et al. 2023)
    **HUBERT_BASE,
    "encoder_layers": 16,
    "encoder_embed_dim": 256,
    "encoder_ffn_embed_dim": 1024,
    "encoder_attention_heads": 4,
}
SHALLOW_WIDE = {
    **HUBERT_BASE,
    "encoder_layers": 8,
    "encoder_embed_dim": 512,
    "encoder_ffn_embed_dim": 2048,
    "encoder_attention_heads": 4,
}
DEBUG = {  # small enough to learn within a minute on two CPU cores
    "extractor_mode": "layer_norm",
    "conv_feature_layers": "[(32,10,5)] + [(32,3,2)] * 4 + [(32,2,2)] * 2",
    "conv_bias": True,  # without it, a LayerNorm right after the first convolution hides the loudness of the speech
    "encoder_layers": 2,
    "encoder_embed_dim": 64,
    "encoder_ffn_embed_dim": 128,
    "encoder_attention_heads": 4,
    "conv_pos": 32,
    "conv_pos_groups": 4,
    "required_seq_len_multiple": 1,
    "final_dim": 64,
    "mask_prob": 0.5,
    "mask_length": 5,
}


def published_size(layers: int, dim: int, heads: int) -> dict[str, Any]:
    """Keys of a Conformer-like preset: published sizes, a feed-forward module of 4 D, and HuBERT-base's pre-training."""
    return {
        **HUBERT_BASE,
        "encoder_layers": layers,
        "encoder_embed_dim": dim,
        "encoder_ffn_embed_dim": 4 * dim,
        "encoder_attention_heads": heads,
        "required_seq_len_multiple": 1,
    }


class Encoder(nn.Module):
    """The base of all encoders: positions and a stack of blocks, at 20 ms per frame.

    It adds the positional convolution to its input and applies LayerNorm and the blocks, or the blocks and LayerNorm if
    `layer_norm_first` (wav2vec 2.0, Baevski et al. 2020, section 2). Padded frames are zero in its input and output, and reach no valid
    frame. A derived class defines `build_block`. If its blocks keep to `Frames.chunks`, it sets `chunk_multiple`: the number of frames in a
    chunk is a multiple of it.

    Args:
        config: the configuration of the model.
    """

    chunk_multiple: int | None = None  # None: this encoder cannot run in chunks
    attention_block: int | None = None  # frames of an attention block; at one bit a chunk must be a part of one, or several

    def __init__(self, config: HubertConfig) -> None:
        super().__init__()
        dim = config.input_dim
        self.layer_norm_first = config.layer_norm_first
        self.layerdrop = config.encoder_layerdrop
        self.multiple = config.required_seq_len_multiple
        self.checkpoint_activations = config.checkpoint_activations
        self.compile_blocks = config.compile_blocks
        self.pos_conv = PositionalEmbedding(dim, config.conv_pos, config.conv_pos_groups, config.causal)
        self.layers = nn.ModuleList([self.build_block(config, index) for index in range(config.encoder_layers)])
        self.layer_norm = self.build_norm(config)
        self.dropout = Dropout(config.dropout)
        self.seed = config.seed
        self.identity_updates = config.identity_attention_updates
        self.num_updates = 0
        self.init_weights()

    def kinds(self) -> Mapping[str, Kind]:
        """Declare the kinds of the encoder's own parts (layers/kinds.py); the modules of its blocks declare theirs.

        Returns:
            The kind of each part by the name of its attribute.
        """
        return {"pos_conv": Kind(POSITIONAL_CONV)}

    def build_block(self, config: HubertConfig, index: int) -> nn.Module:
        """Build one block.

        Args:
            config: the configuration of the model.
            index: the number of the block, from 0.

        Returns:
            A module that is called as block(x (B, T, D), frames: Frames) -> (B, T, D).

        Raises:
            TypeError: the derived class does not define this method.
        """
        raise TypeError(f"{type(self).__name__} must define build_block")

    def build_norm(self, config: HubertConfig) -> nn.Module:
        """Build the norm before the first block, or after the last one if `layer_norm_first`.

        Args:
            config: the configuration of the model.

        Returns:
            A module (B, T, D) -> (B, T, D).
        """
        return nn.LayerNorm(config.encoder_embed_dim)

    @property
    def block_rates(self) -> list[int]:
        """The rate of each block: how many frames of 20 ms one frame of its output stands for."""
        return [1] * len(self.layers)

    def positions(self, x: Tensor, keys: int) -> Tensor | None:
        """Make the positional table that all blocks share.

        Args:
            x: input of the blocks (B, T, D).
            keys: the number of keys: T, or more in a stream.

        Returns:
            The table; None for an encoder without one.
        """
        return None

    def set_num_updates(self, num_updates: int) -> None:
        """Tell the encoder how many updates have been made: which blocks LayerDrop skips depends on it.

        Args:
            num_updates: the number of updates.
        """
        self.num_updates = num_updates

    def _kept(self, depth: int, layerdrop: float) -> list[bool]:
        """Choose the blocks to run. All data-parallel processes must skip the same ones, so LayerDrop has its own generator."""
        if layerdrop == 0.0:
            return [True] * depth
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.num_updates)
        return [draw >= layerdrop for draw in torch.rand(depth, generator=generator).tolist()]

    def init_weights(self) -> None:
        """Draw the weights of linear layers from a normal distribution of deviation 0.02 and set biases to zero (BERT, as in HuBERT)."""
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None, layer: int | None = None, chunks: Chunks | None = None) -> Tensor:
        """Run the blocks. LayerDrop is on in train mode.

        Args:
            x: projected features (B, T, input_dim).
            padding_mask: (B, T) bool, True for padding; None where nothing is padded.
            layer: the block whose output is returned (1 ... L, or 0 for what enters block 1); None for the last.
            chunks: what `HubertModel.chunks` returns; None for the whole utterance.

        Returns:
            The output (B, T, D).

        Raises:
            UserError: the encoder does not have the layer.
        """
        depth = len(self.layers) if layer is None else layer
        if not 0 <= depth <= len(self.layers):
            raise UserError(f"layer={layer} is not there: the encoder has blocks 1 to {len(self.layers)}")
        return self._run(x, padding_mask, depth, self.layerdrop if self.training else 0.0, chunks)[-1]

    def hidden_states(self, x: Tensor, padding_mask: Tensor | None = None, chunks: Chunks | None = None) -> list[Tensor]:
        """Run the blocks and keep what each gives. LayerDrop is off.

        Args:
            x: projected features (B, T, input_dim).
            padding_mask: (B, T) bool, True for padding; None where nothing is padded.
            chunks: what `HubertModel.chunks` returns; None for the whole utterance.

        Returns:
            State 0, which enters block 1, and the output of every block, each (B, T, D).
        """
        return self._run(x, padding_mask, len(self.layers), 0.0, chunks)

    def _run(self, x: Tensor, padding_mask: Tensor | None, depth: int, layerdrop: float, chunks: Chunks | None = None) -> list[Tensor]:
        length = x.size(1)
        if padding_mask is not None:
            x = x.masked_fill(padding_mask.unsqueeze(-1), 0.0)
        x = x + self.pos_conv(x, chunks)
        if not self.layer_norm_first:
            x = self.layer_norm(x)
        whole = chunks is None or chunks.kept is None
        pads = whole and not is_symbolic() and (self.training or x.device.type != "cpu")  # padding changes only speed, and a CPU gains none
        excess = -length % self.multiple if pads else 0
        if is_exporting():  # a graph is for two frames or more, at reduced rates too
            excess = max(self.block_rates) if max(self.block_rates) > 1 else 0
        if excess:
            x = F.pad(x, (0, 0, 0, excess))
            if padding_mask is None:
                padding_mask = torch.zeros(x.size(0), length, dtype=torch.bool, device=x.device)
            padding_mask = F.pad(padding_mask, (0, excess), value=True)
        frames = self.frames(x, None if padding_mask is None else ~padding_mask, chunks)
        states = self.run_blocks(self.dropout(x), frames, self._kept(depth, layerdrop))
        if self.layer_norm_first and depth == len(self.layers):
            states[-1] = self.layer_norm(states[-1])
        if excess:
            states = [s[:, :length] for s in states]
        if frames.valid is not None:
            padded = ~frames.valid[:, :length].unsqueeze(-1)
            states = [s.masked_fill(padded, 0.0) for s in states]
        return states

    def run_blocks(self, x: Tensor, frames: Frames, kept: list[bool]) -> list[Tensor]:
        """Run the first blocks. An encoder that changes rate or width between its blocks overrides this.

        Args:
            x: input of block 1 (B, T, D).
            frames: what blocks need to know of it.
            kept: one entry for each block to run; a block is skipped where it is False.

        Returns:
            x and the output of each block, (B, T, D) at 20 ms per frame.
        """
        states = [x]
        for block, keep in zip(self.layers, kept, strict=False):
            if keep:
                x = self.run_block(block, x, frames)
            states.append(x)
        return states

    def run_block(self, block: nn.Module, x: Tensor, frames: Frames) -> Tensor:
        """Run one block.

        In training it is compiled if `compile_blocks` is set (not in chunks, whose tables change from batch to batch), and its activations
        are recomputed in the backward pass if `checkpoint_activations` is.

        Args:
            block: the block.
            x: its input (B, T, D).
            frames: what it needs to know of x.

        Returns:
            Its output (B, T, D).
        """
        call = compiled_call() if self.compile_blocks and self.training and frames.chunks is None else call_block
        if self.checkpoint_activations and self.training:
            y: Tensor = checkpoint(call, block, x, frames, use_reentrant=False, context_fn=partial(once_tracked, block))
            return y
        return call(block, x, frames)

    def frames(self, x: Tensor, valid: Tensor | None = None, chunks: Chunks | None = None) -> Frames:
        """Collect what blocks need to know of their input.

        Args:
            x: input of the blocks (B, T, D).
            valid: (B, T) bool, False for padding; None where nothing is padded.
            chunks: what `HubertModel.chunks` returns; None for the whole utterance.

        Returns:
            Masks, positions and chunks for the blocks.
        """
        length = x.size(1)
        if chunks is None:
            positions = self.positions(x, length)
        else:
            keys = chunks.keys(length)
            positions = chunks.table(("positions", chunks.size), keys, lambda: self.positions(x, keys))
        attend = None
        if valid is not None:
            attend = valid.clone()
            attend[:, 0] |= ~valid.any(1)  # a row without any valid frame sees its first frame, which avoids 0 / 0 in the softmax
            attend = attend[:, None, None, :]
        if chunks is not None and chunks.kept is None:
            visible = chunks.visible(length, x.device)
            # a padded frame may see only padding, so it also sees itself
            attend = visible if attend is None else visible & attend | torch.eye(length, dtype=torch.bool, device=x.device)
        if self.training and self.identity_updates and self.num_updates < self.identity_updates:
            # the attention matrix is the identity, and the output is W_o W_v x (Schmitt et al. 2024); queries and keys stay in
            # the graph with gradients of zero, because data-parallel training needs them
            attend = torch.eye(length, dtype=torch.bool, device=x.device)[None, None]
        return Frames(valid, attend, positions, chunks)
