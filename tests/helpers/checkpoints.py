"""Checkpoints as fairseq-hydra-train writes them."""

from __future__ import annotations

from pathlib import Path

import torch

from hubert_eff.encoders.registry import encoder_of
from hubert_eff.models.hubert import HubertModel


def checkpoint(model: HubertModel, path: Path) -> Path:
    """As fairseq-hydra-train writes it."""
    config = {"model": {"_name": f"hubert_{encoder_of(model.config).name}", **model.config.to_dict()}, "task": {}}
    torch.save({"cfg": config, "model": model.state_dict()}, path)
    return path
