"""Opens models by name, by the same rule for every command and for S3PRL's upstream."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from ..encoders.registry import list_presets, preset_config, unregistered
from ..errors import UserError
from ..models.hubert import HubertModel, build
from .huggingface import files_of
from .load import load
from .torchfile import structure_only


def digest_of(name: str | os.PathLike[str]) -> str | None:
    """SHA-256 of the files from which a model is read; None for a preset."""
    path = Path(name)
    if not path.exists():
        return None
    digest = hashlib.sha256()
    for file in files_of(path):
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def open_model(name: str | os.PathLike[str], *, structure: bool = False, **overrides: Any) -> HubertModel:
    """Open the model that a name stands for: a file or `PRESET[+wNaM][@SEED]`. A file wins over a preset of its name.

    The global random state stays as it is.

    Args:
        name: a file or folder that `load` reads, or a preset; its random weights are those of the seed, 0 if none is given.
        structure: build a preset on the meta device, without storage for its weights.
        **overrides: keys of the configuration that replace those of the preset; a file keeps its own.

    Returns:
        The model, in eval mode.

    Raises:
        UserError: the name is neither a file nor a preset, the seed is not a number, or `load` or `build` refuse it.
    """
    source = os.fspath(name)
    if not source:
        raise UserError("no model is named: give a checkpoint file, or a preset such as conformer-s, conformer-s+w1a1 or conformer-s@1")
    if os.path.exists(source):
        return load(source)
    preset, at, seed = source.partition("@")
    if preset.partition("+")[0] not in list_presets():
        if os.sep in source or Path(source).suffix in (".pt", ".ckpt", ".safetensors"):
            raise UserError(f"no checkpoint at {source}")
        raise unregistered("preset or checkpoint", source, list_presets())
    if at and not (seed.isascii() and seed.isdecimal() and int(seed[:20]) < 2**63):
        raise UserError(f"'{source}': the seed behind @ must be a number, such as {preset}@1")
    if structure:
        with structure_only():
            return HubertModel(preset_config(preset, **overrides)).eval()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(int(seed or 0))
        return build(preset, **overrides).eval()
