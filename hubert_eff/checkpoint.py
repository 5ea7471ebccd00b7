"""Read checkpoints into plain models: our exports, fairseq checkpoints of this plug-in, and stock HuBERT. Nothing is unpickled blindly."""

from __future__ import annotations

import argparse
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from .config import SAMPLE_RATE, HubertConfig
from .errors import UserError
from .exporting import is_export, read_export
from .model import LABEL_EMBEDDINGS, HubertModel
from .recognition.checkpoint import is_recognizer, read_recognizer
from .registry import get_encoder, list_encoders

# keys of fairseq's HubertConfig that we have no use for: they do not change what the encoder computes
STOCK_UNUSED = {
    "_name", "attn_type", "depthwise_conv_kernel_size", "dropout_features", "fp16", "latent_temp", "mask_channel_min_space",
    "mask_min_space", "no_mask_channel_overlap", "no_mask_overlap", "pos_enc_type",
}  # fmt: skip
# keys that do, with the one value that our Transformer computes
STOCK_FIXED = {"activation_fn": "gelu", "layer_type": "transformer", "conv_pos_batch_norm": False, "pos_conv_depth": 1}


class _Dictionary:
    """Stands in for fairseq's Dictionary, which stock checkpoints hold, where fairseq is not installed."""


_Dictionary.__module__, _Dictionary.__name__, _Dictionary.__qualname__ = "fairseq.data.dictionary", "Dictionary", "Dictionary"


def load(path: str | os.PathLike[str]) -> HubertModel:
    """Load a model in eval mode, on the CPU: our export (.safetensors), a fairseq checkpoint (.pt) of this plug-in, or stock HuBERT.

    Of a fine-tuned checkpoint this is the encoder; `hubert_eff.recognition.load_recognizer` takes its heads along.

    Raises `UserError` if the file is missing, is no checkpoint, holds pickled code, or is of a model that cannot be rebuilt exactly.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"no checkpoint at {file}")
    if is_export(file):
        return read_export(file)
    content = read_fairseq(file)
    if is_recognizer(content):
        return read_recognizer(content, file).hubert
    config, state = config_of(content, file), dict(content["model"])
    embeddings = state.get(LABEL_EMBEDDINGS)
    model = HubertModel(config, _codebooks(content, 0 if embeddings is None else embeddings.size(0)))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file}: the weights do not fit the model that its configuration describes: {reason}") from error
    return model.eval()


def read_fairseq(file: Path) -> dict[str, Any]:
    """The content of a fairseq checkpoint, unpickled with tensors and plain values only. Raises `UserError` if that is not possible."""
    hint = "expected a fairseq checkpoint (.pt) or an export of hubert-eff (.safetensors)"
    safe: list[Any] = [_Dictionary, argparse.Namespace]
    if hasattr(torch.serialization, "safe_globals"):  # torch >= 2.5
        # on its way out it takes away what others had allowed before
        known = torch.serialization.get_safe_globals()
        allowed: Any = torch.serialization.safe_globals([entry for entry in safe if entry not in known])
    else:
        torch.serialization.add_safe_globals(safe)
        allowed = nullcontext()
    try:
        with allowed:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), "")
        if reason:
            raise UserError(f"{file} is refused: it holds pickled code, not only weights ({' '.join(reason.split())[:160]})") from error
        raise UserError(f"{file} is no checkpoint: {hint}") from error
    except Exception as error:  # bytes that are no checkpoint can fail anywhere in the reader
        raise UserError(f"{file} is no checkpoint, or is truncated: {hint}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), Mapping):
        raise UserError(f"{file} is no checkpoint of a model: {hint}")
    return content


def last_checkpoints(folder: str | os.PathLike[str], count: int) -> list[Path]:
    """At most `count` of the last checkpoints that a run saved at intervals, the oldest first: checkpoint_EPOCH_UPDATE.pt in its save_dir,
    and checkpoint_last.pt where it is of another update (fairseq gives no number to what it saves at the end of an epoch).

    Raises `UserError` where there is none.
    """
    if count < 1:
        raise UserError(f"{count} checkpoints cannot be averaged: give at least 1")
    found = {int(match[1]): file for file in Path(folder).glob("checkpoint_*_*.pt") if (match := re.search(r"_(\d+)\.pt$", file.name))}
    newest = Path(folder) / "checkpoint_last.pt"
    if newest.is_file():
        found.setdefault(updates_of(newest), newest)
    if not found:
        raise UserError(
            f"{folder} holds no checkpoint of a run: give its save_dir, trained with checkpoint.save_interval_updates=N "
            f"checkpoint.keep_interval_updates={count}"
        )
    return [found[update] for update in sorted(found)[-count:]]


def newest_checkpoint(folder: str | os.PathLike[str]) -> tuple[int, Path] | None:
    """The checkpoint in a save_dir, under whatever name, that was trained for the most updates of those that a run can go on from, and
    their number. None where the folder holds no checkpoint. Raises `UserError` where none of them can be read.
    """
    found, broken = [], []
    for file in sorted(Path(folder).glob("checkpoint*.pt")):
        try:
            content = read_fairseq(file)
        except UserError:
            broken.append(file.name)
            continue
        if content.get("optimizer_history") and content.get("extra_state"):
            found.append((int(content["optimizer_history"][-1].get("num_updates", 0)), file))
    if broken and not found:
        raise UserError(f"{folder} holds {', '.join(broken)}, none of which can be read: move them away to start anew")
    return max(found, default=None)


def average(paths: Sequence[str | os.PathLike[str]]) -> HubertModel:
    """A model whose weights are the means of those of several checkpoints of one run, in eval mode; counters are those of the last.

    Raises `UserError` as `load` does, and for checkpoints of different models.
    """
    *others, last = paths
    model = load(last)
    state = model.state_dict()
    sums = {key: value.double() for key, value in state.items() if value.is_floating_point()}
    for path in others:
        other = load(path)
        if other.config != model.config or other.num_classes != model.num_classes:
            raise UserError(f"{path} and {last} are not of one run: their models differ")
        for key, value in other.state_dict().items():
            if key in sums:
                sums[key] += value
    model.load_state_dict({**state, **{key: (total / len(paths)).to(state[key].dtype) for key, total in sums.items()}})
    return model


def updates_of(path: str | os.PathLike[str]) -> int:
    """How many updates a checkpoint was trained for; 0 for an export, which does not say."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"no checkpoint at {file}")
    if is_export(file):
        return 0
    history = read_fairseq(file).get("optimizer_history") or [{}]
    return int(history[-1].get("num_updates", 0))


def config_of(content: Mapping[str, Any], file: Path) -> HubertConfig:
    """The model configuration of a fairseq checkpoint. Raises `UserError` for another model, or an option that we do not compute."""
    cfg = content.get("cfg")
    if not isinstance(cfg, Mapping) or not isinstance(cfg.get("model"), Mapping):
        raise UserError(f"{file} has no fairseq configuration (cfg.model): it was not written by fairseq-hydra-train")
    values, task = dict(cfg["model"]), cfg.get("task") or {}
    if task.get("sample_rate", SAMPLE_RATE) != SAMPLE_RATE:
        raise UserError(f"{file} was trained on audio of {task['sample_rate']} Hz: models here take {SAMPLE_RATE} Hz")
    name = str(values.pop("_name", ""))
    encoder = name.removeprefix("hubert_")
    if name != "hubert":
        if not name.startswith("hubert_") or encoder not in list_encoders():
            known = ", ".join(["hubert", *(f"hubert_{e}" for e in list_encoders())])
            raise UserError(f"{file} holds the fairseq model '{name}', which is none of {known}")
        return get_encoder(encoder).config.from_dict(values)
    for key, value in STOCK_FIXED.items():
        if values.pop(key, value) != value:
            raise UserError(f"{file}: stock HuBERT with {key}={cfg['model'][key]} cannot be rebuilt here (only {value})")
    values = {k: v for k, v in values.items() if k not in STOCK_UNUSED}
    values["valid_frames"] = "fairseq"
    values["normalize"] = bool(task.get("normalize", False))
    return get_encoder("transformer").config.from_dict(values)


def _codebooks(content: Mapping[str, Any], rows: int) -> tuple[int, ...]:
    """Sizes of the codebooks: those of the task's dictionaries if they add up, else all codewords are one codebook."""
    dictionaries = (content.get("task_state") or {}).get("dictionaries") or []
    sizes = tuple(len(getattr(d, "symbols", ())) for d in dictionaries)
    if rows and sum(sizes) == rows:
        return sizes
    return (rows,) if rows else ()
