"""Reads fine-tuned checkpoints without unpickling them; no other file is needed."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path

from ..checkpoints.load import is_fine_tuned, open_fairseq
from ..checkpoints.safetensors import COMPUTED, RECOGNIZER, is_export, is_own, read_export, read_heads, read_metadata
from ..checkpoints.torchfile import TorchFile, aligned, structure_only
from ..errors import BUILD_ERRORS, UserError, about, short
from ..models.hubert import HEADS
from .model import Recognizer, RecognizerConfig


def recognizer_in(opened: TorchFile) -> Recognizer:
    """Read the recognizer of a fairseq checkpoint, in eval mode on the CPU. Raises `UserError` for invalid configurations and weights."""
    values = opened.content["cfg"]["model"]
    known = [f.name for f in dataclasses.fields(RecognizerConfig)]
    try:
        config = RecognizerConfig.from_dict({key: values[key] for key in known if key in values})
        config.hubert()
    except (TypeError, ValueError) as error:
        raise UserError(f"its configuration describes no recognizer: {short(error, 600)}") from error
    return opened.fill(functools.partial(Recognizer, config), opened.content["model"])


def load_recognizer(path: str | os.PathLike[str]) -> Recognizer:
    """Load a fine-tuned checkpoint, or an export of one. Raises `UserError` if it is missing or (pre-trained only) has no CTC layer."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"no checkpoint at {file}")
    if not is_export(file):
        with open_fairseq(file) as opened, about(file):
            if is_fine_tuned(opened.content):
                return recognizer_in(opened)
    elif is_own(file) and RECOGNIZER in read_metadata(file):
        return _exported(file)
    raise UserError(f"{file} has no CTC layer: it is a pre-trained model, fine-tune it first (configs/finetune)")


def _exported(file: Path) -> Recognizer:
    """Read the recognizer of an export, in eval mode on the CPU."""
    metadata, heads = read_heads(file)
    encoder = read_export(file)
    with about(file):
        try:
            config = RecognizerConfig.from_dict(json.loads(metadata[RECOGNIZER]))
            config.describe(encoder.config)  # the file describes the encoder itself
            with structure_only():
                model = Recognizer(config)
        except UserError:
            raise
        except BUILD_ERRORS as error:
            raise UserError(f"its metadata describe no recognizer that can be built ({short(error)})") from error
        expected = {name: tensor.shape for name, tensor in model.state_dict().items() if not name.startswith("hubert.")}
        if {name: tensor.shape for name, tensor in heads.items()} != expected:
            wrong = sorted(name for name in expected.keys() | heads.keys() if name not in heads or heads[name].shape != expected.get(name))
            raise UserError(f"the weights of its heads do not fit its configuration: {short(wrong[0])} and {len(wrong) - 1} others")
        model.hubert = encoder
        model.hubert.heads = HEADS[bool(config.decoder_layers)]
        compute = COMPUTED[metadata["dtype"]]
        state = {name: aligned(tensor.to(compute) if tensor.is_floating_point() else tensor) for name, tensor in heads.items()}
        model.load_state_dict(state, strict=False, assign=True)
        if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
            raise UserError("its heads compute buffers that no file holds, so this version cannot read them back")
        return model.eval()
