"""fairseq's real classes instead of restated.py's, for train_gpu.py if fairseq is installed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from fairseq.criterions.hubert_criterion import HubertCriterion
from fairseq.modules.conformer_layer import ConformerWav2Vec2EncoderLayer
from fairseq.optim.adam import FairseqAdam
from omegaconf import OmegaConf
from restated import PENALTY, Stack
from torch import Tensor, nn
from train_step import stock_model as whole_model
from train_step import use_masks as use_masks

logging.disable(logging.INFO)  # fairseq prints its configuration
warnings.simplefilter("ignore", FutureWarning)
stock_loss = HubertCriterion(None, 1.0, 0.0, [PENALTY])


def _run(block: nn.Module, x: Tensor, padding: Tensor | None, positions: Tensor) -> Tensor:
    return block(x, self_attn_padding_mask=padding, position_emb=positions.transpose(0, 1))[0]


def conformer_layers(config: Any) -> nn.ModuleList:
    """fairseq's Conformer layers with relative positions, of the sizes of `config`."""
    return nn.ModuleList(
        ConformerWav2Vec2EncoderLayer(
            embed_dim=config.encoder_embed_dim,
            ffn_embed_dim=config.encoder_ffn_embed_dim,
            attention_heads=config.encoder_attention_heads,
            dropout=config.dropout,
            use_fp16=False,
            depthwise_conv_kernel_size=config.depthwise_conv_kernel_size,
            attn_type="espnet",
            pos_enc_type="rel_pos",
        )
        for _ in range(config.encoder_layers)
    )


def stock_model(config: Any, classes: int, conformer: bool) -> nn.Module:
    """fairseq's HubertModel. Its ConformerEncoder cannot run in this version: the real layers stand in restated.py's stack."""
    model = whole_model(config, classes)
    if conformer:
        layers = conformer_layers(config)
        parts = {"pos_conv": model.encoder.pos_conv, "layers": layers, "layer_norm": model.encoder.layer_norm}
        model.encoder = Stack(parts, True, config.dropout, config.required_seq_len_multiple, _run)
    return model


def stock_adam(params: Iterable[Tensor], lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> torch.optim.Optimizer:
    """What fairseq's optimizer `adam` runs: its own Adam, or apex's where that is installed."""
    keys = {"lr": [lr], "adam_betas": str(betas), "adam_eps": eps, "weight_decay": weight_decay, "fp16_adam_stats": False}
    return FairseqAdam(OmegaConf.create(keys), list(params)).optimizer
