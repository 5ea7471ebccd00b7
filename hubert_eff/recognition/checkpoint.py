"""Read fine-tuned checkpoints: nothing is unpickled blindly, and no other file is needed."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path

from ..checkpoints.load import is_fine_tuned, open_fairseq
from ..checkpoints.safetensors import is_export
from ..checkpoints.torchfile import TorchFile
from ..errors import UserError, about, short
from .model import Recognizer, RecognizerConfig


def recognizer_in(opened: TorchFile) -> Recognizer:
    """The recognizer of a fairseq checkpoint, in eval mode on the CPU. Raises `UserError` for a configuration or weights that are none."""
    values = opened.content["cfg"]["model"]
    known = [f.name for f in dataclasses.fields(RecognizerConfig)]
    try:
        config = RecognizerConfig.from_dict({key: values[key] for key in known if key in values})
        config.hubert()
    except (TypeError, ValueError) as error:
        raise UserError(f"its configuration describes no recognizer: {short(error, 600)}") from error
    return opened.fill(functools.partial(Recognizer, config), opened.content["model"])


def load_recognizer(path: str | os.PathLike[str]) -> Recognizer:
    """Load a fine-tuned checkpoint. Raises `UserError` if it is missing, or has no CTC layer: a pre-trained model, or an export of one."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"no checkpoint at {file}")
    if not is_export(file):
        with open_fairseq(file) as opened, about(file):
            if is_fine_tuned(opened.content):
                return recognizer_in(opened)
    raise UserError(f"{file} has no CTC layer: it is a pre-trained model, fine-tune it first (configs/finetune)")
