"""From a name to a model: the same rule for every command, and for S3PRL's upstream."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from ..encoders.registry import list_presets, preset_config
from ..errors import UserError, unknown
from ..models.hubert import HubertModel, build
from .huggingface import files_of
from .load import load
from .torchfile import structure_only


def digest_of(name: str | os.PathLike[str]) -> str | None:
    """SHA-256 of the files that a model is read from; None for a preset."""
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
    """The model, in eval mode, that a name stands for: FILE or `PRESET[+wNaM][@SEED]`; a file wins over a preset of its name.

    A file, or a folder of Hugging Face, is read by `hubert_eff.load`. A preset has the random weights of its seed, 0 if none is given; the
    global random state stays as it is. overrides: keys of a preset's configuration; a file keeps its own. structure: build a preset without
    storage, on the meta device.

    Raises `UserError` for a name that is neither, a seed that is no number, and as `load` and `build` do.
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
        raise unknown("preset or checkpoint", source, list_presets())
    if at and not (seed.isascii() and seed.isdecimal() and int(seed[:20]) < 2**63):
        raise UserError(f"'{source}': the seed behind @ must be a number, such as {preset}@1")
    if structure:
        with structure_only():
            return HubertModel(preset_config(preset, **overrides)).eval()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(int(seed or 0))
        return build(preset, **overrides).eval()
