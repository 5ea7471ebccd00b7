"""Reads checkpoints into plain models: our exports, fairseq checkpoints of this plug-in, and stock HuBERT, without unpickling them."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import SAMPLE_RATE, HubertConfig
from ..encoders.registry import REMEDY, encoder_of, get_encoder, list_encoders, stored_config
from ..errors import UserError, about, short
from ..models.hubert import HEADS, LABEL_EMBEDDINGS, HubertModel
from .huggingface import is_folder, is_weights, read_folder
from .pickled import NOT_ONE, Stored
from .safetensors import is_export, is_own, read_export
from .torchaudio import is_torchaudio, model_in
from .torchfile import TorchFile, Unreadable

# keys of fairseq's HubertConfig that change the encoder, with the only value that our Transformer computes
STOCK_FIXED = {"activation_fn": "gelu", "layer_type": "transformer", "conv_pos_batch_norm": False, "pos_conv_depth": 1}
# keys of fairseq's HubertConfig that we do not use
STOCK_UNUSED = {
    "_name", *STOCK_FIXED, "attn_type", "depthwise_conv_kernel_size", "dropout_features", "fp16", "latent_temp", "mask_channel_min_space",
    "mask_min_space", "no_mask_channel_overlap", "no_mask_overlap", "pos_enc_type",
}  # fmt: skip

# keys of our configuration that only training reads: a resumed run may change them, and its checkpoints still are of one model
TRAINING_ONLY = (
    "seed", "dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "dropout_input", "feature_grad_mult", "skip_masked",
    "skip_nomask", "mask_", "checkpoint_activations", "compile_blocks", "identity_attention_updates", "chunk_sizes", "left_chunks",
)  # fmt: skip
PRETRAINING = ("quantizer.", "project_q.")  # parts of stock wav2vec 2.0
FINE_TUNED = ("hubert_eff_ctc", "hubert_eff_aed")  # fairseq models of hubert_eff.recognition
DICTIONARY = "fairseq.data.dictionary.Dictionary"
CONVERTED = {"task_cfg", "model_cfg", "model_weight"}  # keys of a fairseq checkpoint that S3PRL has converted
HINT = "expected a fairseq checkpoint (.pt), an export of hubert-eff (.safetensors), or a folder of Hugging Face"

PROGRAMS = {  # exports that other packages run, by suffix, and how
    ".onnx": "is an ONNX graph, which this package does not read: run it with onnxruntime, as examples/06_onnx.py does",
    ".pt2": "is a torch.export program, which this package does not read: run it with torch alone, as "
    "torch.export.load(FILE).module()(wav, padding_mask)",
}


class Dictionary:
    """Stands in for fairseq's Dictionary, which checkpoints hold, if fairseq is not installed."""

    symbols: object


def load(path: str | os.PathLike[str]) -> HubertModel:
    """Load a trained model.

    It reads exports of this package (.safetensors) and fairseq checkpoints (.pt) of this plug-in and of stock HuBERT. It also reads HuBERT
    and wav2vec 2.0 from folders of Hugging Face (or a file of weights in one), state dicts of torchaudio, and the checkpoints that S3PRL
    converts from fairseq's. From a fine-tuned checkpoint it loads the encoder alone; `hubert_eff.recognition.load_recognizer` also loads
    the heads. Nothing in a file is executed.

    Args:
        path: a file, or a folder of Hugging Face.

    Returns:
        The model, in eval mode, on the CPU.

    Raises:
        UserError: the file is missing, is not a checkpoint (an ONNX graph is not one), holds pickled code, or describes a model that cannot
            be rebuilt exactly.
    """
    file = Path(path)
    if file.is_dir():
        return read_folder(file)
    if not file.is_file():
        raise UserError(f"no checkpoint at {file}")
    if is_export(file):
        return read_export(file) if is_own(file) or not is_folder(file) else read_folder(file.parent)
    with _opened(file) as opened, about(file):
        if is_torchaudio(opened.content):
            return model_in(opened)
        if is_folder(file) and is_weights(opened.content):
            return read_folder(file.parent)
        _check_model(opened)
        return _encoder_in(opened) if is_fine_tuned(opened.content) else _model_in(opened)


def is_fine_tuned(content: Mapping[str, Any]) -> bool:
    """Whether a fairseq checkpoint is a fine-tuned one of this plug-in."""
    cfg = content.get("cfg")
    return isinstance(cfg, Mapping) and isinstance(cfg.get("model"), Mapping) and cfg["model"].get("_name") in FINE_TUNED


def _encoder_in(opened: TorchFile) -> HubertModel:
    """The encoder of a fine-tuned checkpoint, without its heads."""
    values = opened.content["cfg"]["model"]
    try:
        config = stored_config(str(values.get("encoder")), values.get("encoder_config") or "")
    except UserError as error:
        raise UserError(f"its configuration describes no recognizer: {short(error, 600)}") from error
    held = {str(name): value for name, value in opened.content["model"].items()}
    weights = {name.removeprefix("hubert."): value for name, value in held.items() if name.startswith("hubert.")}
    model = opened.fill(functools.partial(HubertModel, config), weights)
    model.heads = HEADS[bool(values.get("decoder_layers"))]
    return model


def _model_in(opened: TorchFile) -> HubertModel:
    """The pre-trained model of a fairseq checkpoint."""
    content = opened.content
    config, weights = config_of(content, opened.file), content["model"]
    if content["cfg"]["model"].get("_name") == "wav2vec2":
        weights = {name: value for name, value in weights.items() if not str(name).startswith(PRETRAINING)}
    embeddings = weights.get(LABEL_EMBEDDINGS)
    rows = embeddings.shape[0] if isinstance(embeddings, Stored) and embeddings.shape else 0
    return opened.fill(functools.partial(HubertModel, config, _codebooks(content, rows)), weights)


def open_fairseq(file: Path) -> TorchFile:
    """Open a fairseq checkpoint, or one that S3PRL has converted, leaving its tensors in the file; nothing is unpickled.

    Raises `UserError` for other files.
    """
    opened = _opened(file)
    try:
        _check_model(opened)
    except UserError:
        opened.close()
        raise
    return opened


def _opened(file: Path) -> TorchFile:
    if file.suffix in PROGRAMS:
        raise UserError(f"{file} {PROGRAMS[file.suffix]}")
    try:
        opened = TorchFile(file, {DICTIONARY: Dictionary})
    except Unreadable as error:
        raise UserError(f"{error}: {HINT}" if error.reason == NOT_ONE else str(error)) from error
    if isinstance(opened.content, dict) and CONVERTED <= opened.content.keys():
        opened.content = _unconverted(opened.content)
    return opened


def _check_model(opened: TorchFile) -> None:
    if not isinstance(opened.content, dict) or not isinstance(opened.content.get("model"), Mapping):
        raise UserError(f"{opened.file} is not a checkpoint of a model: {HINT}")


def _unconverted(content: Mapping[str, Any]) -> dict[str, Any]:
    """Restore what S3PRL's `load_and_convert_fairseq_ckpt` was given, as far as it keeps that."""
    model, symbols = content["model_cfg"], content.get("dictionaries_symbols")
    dictionaries = []
    for names in symbols if isinstance(symbols, list) else []:
        dictionaries.append(Dictionary())
        dictionaries[-1].symbols = names
    if isinstance(model, Mapping):
        model = {"_name": "hubert" if dictionaries else "wav2vec2", **model}
    return {
        "cfg": {"model": model, "task": content["task_cfg"]},
        "model": content["model_weight"],
        "task_state": {"dictionaries": dictionaries},
    }


def read_fairseq(file: Path) -> dict[str, Any]:
    """The whole content of a fairseq checkpoint, with its tensors. Raises `UserError` as `open_fairseq` does."""
    with open_fairseq(file) as opened:
        content: dict[str, Any] = opened.whole()
        return content


def last_checkpoints(folder: str | os.PathLike[str], count: int) -> list[Path]:
    """List at most `count` of the last checkpoints of a run, the oldest first: checkpoint_EPOCH_UPDATE.pt and checkpointEPOCH.pt in its
    save_dir, and checkpoint_last.pt if it belongs to another update (fairseq does not number what it saves at the end of an epoch).

    Raises `UserError` where there is none.
    """
    if count < 1:
        raise UserError(f"{count} checkpoints cannot be averaged: give at least 1")
    found = {int(match[1]): file for file in Path(folder).glob("checkpoint_*_*.pt") if (match := re.search(r"_(\d+)\.pt$", file.name))}
    for file in (*Path(folder).glob("checkpoint[0-9]*.pt"), Path(folder) / "checkpoint_last.pt"):
        if file.is_file():
            found.setdefault(updates_of(file), file)
    if not found:
        raise UserError(f"{folder} holds no checkpoint of a run: give its save_dir, trained with {keep_keys(count)}")
    return [found[update] for update in sorted(found)[-count:]]


def keep_keys(count: int) -> str:
    """The overrides by which a training run leaves `count` checkpoints to average."""
    return f"checkpoint.save_interval_updates=N checkpoint.keep_interval_updates={count}"


def newest_checkpoint(folder: str | os.PathLike[str]) -> tuple[int, Path] | None:
    """Find the checkpoint in a save_dir, under any name, with the most updates from which a run can resume, and return (updates, file).
    None if the folder holds no checkpoint. Raises `UserError` if none of them can be read.
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
    """Average the weights of several checkpoints of one run into a model in eval mode; counters are those of the last.

    Keys that only training reads, such as dropout, may differ, since a resumed run may have changed them. Raises `UserError` as `load`
    does, and for checkpoints of different models, naming the first keys that differ.
    """
    *others, last = paths
    model = load(last)
    state = model.state_dict()
    sums = {key: value.double() for key, value in state.items() if value.is_floating_point()}
    for path in others:
        other = load(path)
        if differing := _differing(other, model):
            raise UserError(f"{path} and {last} are not of one run: {differing}")
        for key, value in other.state_dict().items():
            if key in sums:
                sums[key] += value
    model.load_state_dict({**state, **{key: (total / len(paths)).to(state[key].dtype) for key, total in sums.items()}})
    return model


def _differing(one: HubertModel, other: HubertModel) -> str:
    """The first three keys in which the models differ, with both values; empty if their weights may be averaged."""
    encoders = encoder_of(one.config).name, encoder_of(other.config).name
    values = [{"encoder": name, **m.config.to_dict(), "num_classes": m.num_classes} for name, m in zip(encoders, (one, other), strict=True)]
    first, second = values
    keys = [key for key in {**first, **second} if first.get(key) != second.get(key) and not key.startswith(TRAINING_ONLY)]
    said = [f"{key} is {_shown(first.get(key))} and {_shown(second.get(key))}" for key in keys[:3]]
    return ", ".join(said) + (f", and {len(keys) - 3} more keys differ" if len(keys) > 3 else "")


def _shown(value: object) -> str:
    return short(str(value), 60)


def updates_of(path: str | os.PathLike[str]) -> int:
    """The number of updates of a checkpoint; 0 for an export or a folder of Hugging Face, which do not say."""
    file = Path(path)
    if file.is_dir():
        return 0
    if not file.is_file():
        raise UserError(f"no checkpoint at {file}")
    if is_export(file):
        return 0
    with open_fairseq(file) as opened:
        history = opened.content.get("optimizer_history")
    last = history[-1] if isinstance(history, list) and history else {}
    updates = last.get("num_updates", 0) if isinstance(last, Mapping) else 0
    return updates if isinstance(updates, int) else 0


def config_of(content: Mapping[str, Any], file: Path) -> HubertConfig:
    """The model configuration of a fairseq checkpoint. Raises `UserError` for another model, or an option that we do not compute."""
    cfg = content.get("cfg")
    if not isinstance(cfg, Mapping) or not isinstance(cfg.get("model"), Mapping):
        raise UserError(f"{file} has no fairseq configuration (cfg.model): it was not written by fairseq-hydra-train")
    values, task = dict(cfg["model"]), cfg.get("task") or {}
    if not isinstance(task, Mapping):
        raise UserError(f"{file} has no fairseq configuration (cfg.task)")
    if task.get("sample_rate", SAMPLE_RATE) != SAMPLE_RATE:
        raise UserError(f"{file} was trained on audio of {_said(task['sample_rate'])} Hz: models here take {SAMPLE_RATE} Hz")
    name = values.pop("_name", "")
    encoder = name.removeprefix("hubert_") if isinstance(name, str) else ""
    if name == "wav2vec2":
        return _wav2vec2(values, bool(task.get("normalize", False)))
    if name != "hubert":
        if encoder == name or encoder not in list_encoders():
            known = ", ".join(["hubert", "wav2vec2", *(f"hubert_{e}" for e in list_encoders())])
            raise UserError(f"{file} holds the fairseq model '{_said(name)}', which is not one of {known}. {REMEDY}")
        return stored_config(encoder, values)
    _check_fixed(values, STOCK_FIXED, "HuBERT")
    values = {k: v for k, v in values.items() if k not in STOCK_UNUSED}
    values["valid_frames"] = "fairseq"
    values["normalize"] = bool(task.get("normalize", False))
    return stored_config("transformer", values)


def _wav2vec2(values: Mapping[str, Any], normalize: bool) -> HubertConfig:
    """The encoder of stock wav2vec 2.0. It counts padding by whole receptive fields; its quantizer is not used."""
    _check_fixed(values, {**STOCK_FIXED, "quantize_input": False, "crop_seq_to_multiple": 1}, "wav2vec 2.0")
    known = {field.name for field in dataclasses.fields(get_encoder("transformer").config)}
    return stored_config("transformer", {**{key: value for key, value in values.items() if key in known}, "normalize": normalize})


def _check_fixed(values: Mapping[str, Any], fixed: Mapping[str, Any], kind: str) -> None:
    for key, wanted in fixed.items():
        if (found := values.get(key, wanted)) != wanted:
            raise UserError(f"stock {kind} with {key}={_said(found)} cannot be rebuilt here (only {wanted})")


def _said(value: object) -> str:
    """A value of a file as text; only the type of one that holds others."""
    return short(value) if isinstance(value, (str, int, float)) else f"a {type(value).__name__}"


def _codebooks(content: Mapping[str, Any], rows: int) -> tuple[int, ...]:
    """Sizes of the codebooks: those of the task's dictionaries if they add up; otherwise all codewords form one codebook."""
    state = content.get("task_state")
    dictionaries = state.get("dictionaries") if isinstance(state, Mapping) else None
    symbols = [getattr(d, "symbols", ()) for d in dictionaries] if isinstance(dictionaries, (list, tuple)) else []
    sizes = tuple(len(s) for s in symbols if isinstance(s, (list, tuple)))
    if rows and sum(sizes) == rows and all(sizes):
        return sizes
    return (rows,) if rows else ()
