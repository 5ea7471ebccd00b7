"""Read fine-tuned checkpoints: nothing is unpickled blindly, and no other file is needed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from .model import Recognizer, RecognizerConfig

NAMES = ("hubert_eff_ctc", "hubert_eff_aed")  # fairseq models


def read_recognizer(content: Mapping[str, Any], file: Path) -> Recognizer:
    """The recogniser of a fairseq checkpoint, in eval mode on the CPU. Raises `UserError` for a configuration or weights that are none."""
    values = content["cfg"]["model"]
    known = [f.name for f in dataclasses.fields(RecognizerConfig)]
    try:
        model = Recognizer(RecognizerConfig.from_dict({key: values[key] for key in known if key in values}))
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: its configuration describes no recogniser: {' '.join(str(error).split())}") from error
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        raise UserError(f"{file}: the weights do not fit its configuration: {' '.join(str(error).split())}") from error
    return model.eval()


def is_recognizer(content: Mapping[str, Any]) -> bool:
    """Whether a fairseq checkpoint is a fine-tuned one of this plug-in."""
    cfg = content.get("cfg")
    return isinstance(cfg, Mapping) and isinstance(cfg.get("model"), Mapping) and cfg["model"].get("_name") in NAMES


def load_recognizer(path: str | os.PathLike[str]) -> Recognizer:
    """Load a fine-tuned checkpoint. Raises `UserError` if it is missing, or has no CTC layer: a pre-trained model, or an export of one."""
    from ..checkpoint import read_fairseq
    from ..exporting import is_export

    file = Path(path)
    if not file.is_file():
        raise UserError(f"no checkpoint at {file}")
    content = None if is_export(file) else read_fairseq(file)
    if content is None or not is_recognizer(content):
        raise UserError(f"{file} has no CTC layer: it is a pre-trained model, fine-tune it first (configs/finetune)")
    return read_recognizer(content, file)
