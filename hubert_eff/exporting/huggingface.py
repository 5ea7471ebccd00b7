"""Writes a model as a folder of Hugging Face, without importing transformers.

A Transformer becomes a `HubertModel` (with its CTC layer a `HubertForCTC`) that knows nothing of this package. Other encoders and one-bit
models keep the file of `hubert_eff.export`, which the classes of `hubert_eff.hf` read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .. import __version__
from ..checkpoints.huggingface import CONFIG, KEYS, MODES, OWN, PREFIXES, PREPROCESSOR, WEIGHTS, their_name
from ..checkpoints.safetensors import DTYPES, FLOAT, TRAINING, read_metadata
from ..config import MEL_FRONTS, SAMPLE_RATE, HubertConfig
from ..encoders.registry import encoder_of
from ..errors import UserError, unknown
from ..models.hubert import LABEL_EMBEDDINGS, HubertModel
from ..quant.storage import tensors
from ..recognition import Recognizer
from ..recognition.alphabet import BLANK, BOUNDARY
from ..utils.files import replacing, writable, write_json, write_text
from .safetensors import export, require_no_heads, sort_metadata

PAD, UNKNOWN = "<pad>", "<unk>"  # tokens of the tokenizer; the first is CTC's blank
VOCABULARY, TOKENIZER, CODE = "vocab.json", "tokenizer_config.json", "modeling_hubert_eff.py"
REMOTE = '''"""What `trust_remote_code=True` reads: the classes are those of the package hubert-eff, which must be installed."""

from hubert_eff.hf import HubertEffConfig, HubertEffModel

__all__ = ["HubertEffConfig", "HubertEffModel"]
'''
LEFT_OUT = ("final_proj.", "target_glu.")  # parts for pre-training, left out like the label embeddings
TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def is_native(model: HubertModel) -> bool:
    """Whether transformers' own HubertModel computes what this model does."""
    config = model.config
    mel = config.conv_feature_layers in MEL_FRONTS
    return encoder_of(config).name == "transformer" and config.quant == "none" and not (mel or config.causal or model.fused)


def export_folder(
    model: HubertModel | Recognizer, folder: str | os.PathLike[str], *, dtype: str = "fp32", packed: bool = True,
    encoder_only: bool = False, source: str | os.PathLike[str] = "", notes: Mapping[str, str] | None = None,
) -> dict[str, str]:  # fmt: skip
    """Write a model to a folder: config.json, model.safetensors, preprocessor_config.json and, for a recognizer, the tokenizer's files.

    Arguments are those of `hubert_eff.export`. Returns entries of the model card by name. Raises `UserError` as `export` does, and, without
    `encoder_only`, for an attention decoder and for a recognizer that transformers has no class for.
    """
    hubert = model.hubert if isinstance(model, Recognizer) else model
    if not isinstance(hubert, HubertModel):
        raise UserError(f"cannot export a {type(model).__name__}: expected a HubertModel or a Recognizer")
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    recognizer = model if isinstance(model, Recognizer) and not encoder_only else None
    if recognizer is None and not encoder_only:
        require_no_heads(hubert)
    if recognizer is not None:
        require_ctc(recognizer)
    target = writable(folder)
    notes = dict(notes or {})
    if is_native(hubert):
        _write_weights(hubert, recognizer, target / WEIGHTS[0], dtype, notes.get(TRAINING, ""))
        values = _native_config(hubert.config, recognizer, dtype)
        said = {
            "encoder": "transformer", "config": json.dumps(hubert.config.to_dict()), "weights": FLOAT, "policy": "", "dtype": dtype,
            "source": Path(source).name, "package_version": __version__, "format_version": "of transformers", **notes,
        }  # fmt: skip
    else:
        export(hubert, target / WEIGHTS[0], dtype=dtype, packed=packed, encoder_only=encoder_only, source=source, notes=notes)
        values = _own_config(hubert.config)
        said = read_metadata(target / WEIGHTS[0])
    files: dict[str, Any] = {PREPROCESSOR: _preprocessor(hubert.config, recognizer, is_native(hubert))}
    if recognizer is not None:
        files[VOCABULARY] = {PAD: BLANK, **{letter: number for number, letter in enumerate(recognizer.alphabet.symbols, start=1)}}
        files[TOKENIZER] = _tokenizer(files[VOCABULARY])
    else:
        files[TOKENIZER] = {"tokenizer_class": "Wav2Vec2FeatureExtractor"}  # the class that pipeline("feature-extraction") calls
    for name, content in files.items():
        write_json(target / name, content)
    if not is_native(hubert):
        write_text(target / CODE, REMOTE)
    for name, written in ((VOCABULARY, recognizer is not None), (CODE, not is_native(hubert))):
        if not written:  # may remain from another model
            (target / name).unlink(missing_ok=True)
    write_json(target / CONFIG, values)  # written last: without it the folder does not count
    return said


def require_ctc(recognizer: Recognizer) -> None:
    """Raise `UserError` for a recognizer that transformers has no class for."""
    if recognizer.decoder is not None:
        raise UserError("its attention decoder has no place in transformers' classes: --encoder-only leaves decoder and CTC layer out")
    if not is_native(recognizer.hubert):
        raise UserError("transformers has a CTC layer for the Transformer alone: --encoder-only leaves it out, the checkpoint keeps it")
    if recognizer.config.output_downsampling > 1:
        rate = recognizer.config.output_downsampling
        raise UserError(f"its output_downsampling={rate} has no place in transformers' classes: --encoder-only leaves the CTC layer out")
    recognizer.check_ctc()
    if recognizer.alphabet.pieces is not None:
        raise UserError("its symbols are pieces of a sentencepiece model, and transformers' CTC classes know letters: use --encoder-only")


def _write_weights(hubert: HubertModel, recognizer: Recognizer | None, file: Path, dtype: str, training: str) -> None:
    state = {name: tensor for name, tensor in tensors(hubert, DTYPES[dtype], LABEL_EMBEDDINGS).items() if not name.startswith(LEFT_OUT)}
    weights = {their_name(name): tensor for name, tensor in state.items()}
    if not _masks(hubert.config):
        del weights[their_name("mask_emb")]
    if hubert.post_extract_proj is None:  # theirs always projects
        weights.update(_identity(hubert.config, DTYPES[dtype]))
    if recognizer is not None:
        weights = {f"{PREFIXES[0]}{name}": tensor for name, tensor in weights.items()}
        weights.update({f"lm_head.{name}": tensor for name, tensor in tensors(recognizer.ctc_proj, DTYPES[dtype], "").items()})
    with replacing(file) as temporary:
        save_file(weights, temporary, {"format": "pt", **({TRAINING: training} if training else {})})
        sort_metadata(temporary)


def _identity(config: HubertConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    projection = their_name("post_extract_proj.")
    width = config.input_dim
    return {f"{projection}weight": torch.eye(width, dtype=dtype), f"{projection}bias": torch.zeros(width, dtype=dtype)}


def _masks(config: HubertConfig) -> bool:
    """Whether their model has a mask embedding."""
    return config.mask_prob > 0 or config.mask_channel_prob > 0


def _native_config(config: HubertConfig, recognizer: Recognizer | None, dtype: str) -> dict[str, Any]:
    values = config.to_dict()
    dims, kernels, strides = zip(*config.conv_layers, strict=True)
    of_ctc = {} if recognizer is None else {"vocab_size": len(recognizer.alphabet), "final_dropout": recognizer.config.final_dropout}
    return {
        "architectures": ["HubertModel" if recognizer is None else "HubertForCTC"],
        "model_type": "hubert",
        **{theirs: values[ours] for theirs, (ours, _) in KEYS.items()},
        "feat_extract_norm": next(theirs for theirs, ours in MODES.items() if ours == config.extractor_mode),
        "conv_dim": list(dims), "conv_kernel": list(kernels), "conv_stride": list(strides), "num_feat_extract_layers": len(dims),
        "hidden_act": "gelu", "feat_extract_activation": "gelu", "layer_norm_eps": 1e-5, "conv_pos_batch_norm": False,
        "mask_time_prob": config.mask_prob, "mask_time_length": config.mask_length,
        "mask_feature_prob": config.mask_channel_prob, "mask_feature_length": config.mask_channel_length,
        "pad_token_id": BLANK, "torch_dtype": TORCH_NAMES[dtype], **of_ctc,
    }  # fmt: skip


def _own_config(config: HubertConfig) -> dict[str, Any]:
    module = CODE.removesuffix(".py")
    return {
        "architectures": ["HubertEffModel"],
        "model_type": OWN,
        "auto_map": {"AutoConfig": f"{module}.HubertEffConfig", "AutoModel": f"{module}.HubertEffModel"},
        "encoder": encoder_of(config).name,
        "encoder_config": config.to_dict(),
        "hidden_size": config.encoder_embed_dim,
        "num_hidden_layers": config.encoder_layers,
    }


def _preprocessor(config: HubertConfig, recognizer: Recognizer | None, native: bool) -> dict[str, Any]:
    """The configuration of transformers' feature extractor; models of our own classes normalize audio themselves."""
    processor = {} if recognizer is None else {"processor_class": "Wav2Vec2Processor"}
    return {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor", "feature_size": 1, "sampling_rate": SAMPLE_RATE, "padding_side": "right",
        "padding_value": 0.0, "do_normalize": config.normalize and native, "return_attention_mask": True, **processor,
    }  # fmt: skip


def _tokenizer(vocabulary: Mapping[str, int]) -> dict[str, Any]:
    return {
        "tokenizer_class": "Wav2Vec2CTCTokenizer", "processor_class": "Wav2Vec2Processor", "pad_token": PAD, "unk_token": UNKNOWN,
        "bos_token": None, "eos_token": None, "word_delimiter_token": BOUNDARY if BOUNDARY in vocabulary else None,
        "do_lower_case": False,
    }  # fmt: skip
