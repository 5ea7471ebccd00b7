"""One safetensors file that holds a model: weights, and its configuration as metadata. Reading it unpickles nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from . import __version__
from .errors import UserError
from .files import replacing
from .fusing import fuse
from .layers.linear import Linear
from .model import HubertModel
from .registry import encoder_of, get_encoder

FORMAT = "hubert-eff"


def export(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a HuBERT as float weights to `path` (.safetensors), which `hubert_eff.load` reads back.

    The label embeddings, which only pre-training uses, are left out. Raises `UserError` for another model or another suffix.
    """
    if not isinstance(model, HubertModel):
        raise UserError(f"cannot export a {type(model).__name__}: expected a HubertModel")
    if Path(path).suffix != ".safetensors":
        raise UserError(f"an export is a .safetensors file, not {path}")
    metadata = {
        "format": FORMAT,
        "version": __version__,
        "encoder": encoder_of(model.config).name,
        "config": json.dumps(model.config.to_dict(), sort_keys=True),
        "fused": json.dumps(model.fused),
        "final_projections": str(model.final_proj.out_features // model.config.codebook_dim),
    }
    weights = {name: w.detach().cpu().contiguous() for name, w in model.state_dict().items() if name != "label_embs_concat"}
    with replacing(path) as temporary:
        save_file(weights, temporary, metadata)


def is_export(file: Path) -> bool:
    """Whether a file is in the safetensors format: eight bytes of length, then a JSON object."""
    with file.open("rb") as stream:
        head = stream.read(9)
    return len(head) == 9 and head[8:] == b"{"


def read_export(file: Path) -> HubertModel:
    """The model of an export, in eval mode on the CPU. Raises `UserError` for a safetensors file that is none."""
    try:
        with safe_open(file, framework="pt") as stream:
            metadata = stream.metadata() or {}
            weights = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise UserError(f"{file} is truncated or damaged: {error}") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{file} is a safetensors file, but no export of hubert-eff")
    config = get_encoder(metadata["encoder"]).config.from_dict(json.loads(metadata["config"]))
    model = HubertModel(config)
    if metadata["final_projections"] != "1":
        code = config.codebook_dim * int(metadata["final_projections"])
        model.final_proj = Linear(config.encoder_embed_dim, code)
    if metadata.get("fused") == "true":
        model = fuse(model)  # the structure; the weights are the file's
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{file}: the weights do not fit its configuration: {' '.join(str(error).split())}") from error
    return model.eval()
