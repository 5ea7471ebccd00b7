"""Writes a fine-tuned model as one safetensors file: its encoder as `export` writes it, with its heads and alphabet."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from ..checkpoints.safetensors import DTYPES, HEADS, RECOGNIZER
from ..errors import UserError
from ..recognition.model import Recognizer
from ..utils.files import replacing, writable
from .safetensors import export, sort_metadata


def export_recognizer(model: Recognizer, path: str | os.PathLike[str], *, notes: Mapping[str, str] | None = None, **how: Any) -> None:
    """Write a recognizer to `path` (.safetensors), which `load_recognizer` reads back; `hubert_eff.load` reads its encoder.

    The encoder is written as by `export`, packed if it is w1a1; CTC layer, decoder and downsampling follow in the dtype of the rest, and
    the alphabet is in the metadata.

    Args:
        model: a fine-tuned model.
        path: the file to write.
        notes: further metadata, as text by name.
        how: `dtype`, `packed`, `fuse` and `source` of `export`.

    Raises:
        UserError: `export` would refuse the encoder, or weights of the heads are not finite.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise UserError(f"an export is a .safetensors file, not {path}")
    config = json.dumps(dataclasses.asdict(model.config), sort_keys=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=writable(target.parent)) as folder:
        part = Path(folder) / "encoder.safetensors"
        export(model.hubert, part, encoder_only=True, notes={**(notes or {}), RECOGNIZER: config}, **how)
        with safe_open(part, framework="pt") as stream:
            metadata = stream.metadata()
            weights = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a mapping)
        dtype = DTYPES[metadata["dtype"]]
        for name, tensor in model.state_dict().items():
            if name.startswith("hubert."):
                continue
            if tensor.is_floating_point():
                tensor = tensor.to(dtype)
                if not bool(tensor.isfinite().all()):
                    raise UserError(f"{name} holds numbers that are not finite, or too large for {metadata['dtype']}")
            weights[HEADS + name] = tensor.contiguous()
        with replacing(target) as temporary:
            save_file(weights, temporary, metadata)
            sort_metadata(temporary)
