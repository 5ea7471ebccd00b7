"""Folders of Hugging Face: `config.json` and weights of a HuBERT or wav2vec 2.0 encoder, read without importing transformers."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..config import CONV_FEATURE_LAYERS, LONGEST, MOST_LAYERS, SAMPLE_RATE, HubertConfig
from ..encoders.registry import stored_config
from ..errors import UserError, about, short
from ..models.hubert import HEADS, HubertModel
from .foreign import FLOATS, Held, filled, held_in, without_prefix
from .pickled import Stored
from .safetensors import NAMES, read_export
from .torchfile import TorchFile

PROJECTION = "post_extract_proj."
CONFIG, PREPROCESSOR, ADAPTER = "config.json", "preprocessor_config.json", "adapter_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SUFFIXES = (".safetensors", ".bin")
PREFIXES = ("hubert.", "wav2vec2.")  # prefixes of the encoder in a model with a head
# heads of pre-training and of fine-tuned models
PRETRAINING = ("quantizer.", "project_q.", "project_hid.")
FINE_TUNED = {
    "lm_head.": HEADS[0],
    **dict.fromkeys(
        ("classifier.", "projector.", "layer_weights", "tdnn.", "feature_extractor.weight", "feature_extractor.bias", "objective."),
        "classifier",
    ),
}
LARGEST_INDEX = 1 << 24  # bytes

# their key -> our key, and its value if config.json does not have it
KEYS: dict[str, tuple[str, Any]] = {
    "hidden_size": ("encoder_embed_dim", 768),
    "num_hidden_layers": ("encoder_layers", 12),
    "intermediate_size": ("encoder_ffn_embed_dim", 3072),
    "num_attention_heads": ("encoder_attention_heads", 12),
    "num_conv_pos_embeddings": ("conv_pos", 128),
    "num_conv_pos_embedding_groups": ("conv_pos_groups", 16),
    "do_stable_layer_norm": ("layer_norm_first", False),
    "conv_bias": ("conv_bias", False),
    "feat_proj_layer_norm": ("feature_norm", True),
    "hidden_dropout": ("dropout", 0.1),
    "attention_dropout": ("attention_dropout", 0.1),
    "activation_dropout": ("activation_dropout", 0.1),
    "feat_proj_dropout": ("dropout_input", 0.0),
    "layerdrop": ("encoder_layerdrop", 0.1),
}
CONVOLUTIONS = {"conv_dim": (512,) * 7, "conv_kernel": (10, 3, 3, 3, 3, 2, 2), "conv_stride": (5, 2, 2, 2, 2, 2, 2)}
MODES = {"group": "default", "layer": "layer_norm"}
# keys with the only value that the Transformer here computes
FIXED: dict[str, Any] = {
    "hidden_act": "gelu", "feat_extract_activation": "gelu", "layer_norm_eps": 1e-5, "conv_pos_batch_norm": False, "add_adapter": False,
    "adapter_attn_dim": None,
}  # fmt: skip
COUNTS = ("num_batches_tracked", "position_ids")  # integer tensors that do not mean quantization
EPS = 1e-7  # added to the variance of audio by transformers
OWN = "hubert_eff"  # model_type of folders that only `hubert_eff.hf` reads
MODELS = ("hubert", "wav2vec2")
OTHERS = {  # why related models cannot be read
    "wavlm": "gated relative positions", "data2vec-audio": "a stack of positional convolutions", "sew": "squeezed time",
    "sew-d": "squeezed time and disentangled attention", "wav2vec2-conformer": "blocks with convolutions",
    "wav2vec2-bert": "blocks with convolutions on a log-mel spectrogram", "whisper": "a log-mel spectrogram and another Transformer",
}  # fmt: skip
# our names -> theirs; the first match counts
RENAMED = tuple(
    (re.compile(ours), theirs)
    for ours, theirs in (
        (r"^feature_extractor\.conv_layers\.(\d+)\.0\.", r"feature_extractor.conv_layers.\1.conv."),
        (r"^feature_extractor\.conv_layers\.(\d+)\.2\.(?:1\.)?", r"feature_extractor.conv_layers.\1.layer_norm."),
        (r"^layer_norm\.", "feature_projection.layer_norm."),
        (r"^post_extract_proj\.", "feature_projection.projection."),
        (r"^mask_emb$", "masked_spec_embed"),
        (r"^encoder\.pos_conv\.0\.", "encoder.pos_conv_embed.conv."),
        (r"^(encoder\.layers\.\d+)\.self_attn\.", r"\1.attention."),
        (r"^(encoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.layer_norm."),
        (r"^(encoder\.layers\.\d+)\.fc1\.", r"\1.feed_forward.intermediate_dense."),
        (r"^(encoder\.layers\.\d+)\.fc2\.", r"\1.feed_forward.output_dense."),
    )
)


def their_name(ours: str) -> str:
    """The name in Hugging Face's HubertModel of a tensor of `hubert_transformer`."""
    for pattern, theirs in RENAMED:
        name, count = pattern.subn(theirs, ours)
        if count:
            return name
    return ours


def without_identity(held: dict[str, Held], projection: str, config: HubertConfig) -> dict[str, Held]:
    """Remove a projection of the extractor's output to its own width, which models here do not have: it must be the identity.

    projection: the prefix of its name. Raises `UserError` if it is not the identity.
    """
    if config.conv_layers[-1][0] != config.input_dim:
        return held
    weight, bias = (held.get(f"{projection}{name}") for name in ("weight", "bias"))
    wide = (config.input_dim, config.input_dim)
    if weight is None or bias is None or weight.shape != wide or bias.shape != wide[:1]:
        return held  # its name is refused later
    if not torch.equal(weight.read().float(), torch.eye(config.input_dim)) or bool(bias.read().any()):
        raise UserError(f"it projects {config.input_dim} channels to as many ({projection}weight), which the Transformer here cannot hold")
    return {name: tensor for name, tensor in held.items() if not name.startswith(projection)}


def is_folder(path: Path) -> bool:
    """Whether a folder, or the folder of a file of weights, has a config.json."""
    return (path if path.is_dir() else path.parent).joinpath(CONFIG).is_file()


def files_of(path: Path) -> list[Path]:
    """The files that decide which model is read from a path: itself, or configuration and weights of a folder of Hugging Face."""
    if not path.is_dir() and (path.suffix not in SUFFIXES or not is_folder(path)):
        return [path]
    folder = path if path.is_dir() else path.parent
    names = {CONFIG, PREPROCESSOR, *WEIGHTS}
    return sorted(file for file in folder.iterdir() if file.is_file() and (file.name in names or file.suffix in SUFFIXES))


def is_weights(content: object) -> bool:
    """Whether the content of a file of `torch.save` is nothing but tensors by name."""
    return isinstance(content, dict) and bool(content) and all(isinstance(stored, Stored) for stored in content.values())


def read_folder(folder: Path) -> HubertModel:
    """Read the encoder of a folder of Hugging Face, in eval mode on the CPU; the head of a fine-tuned model is left out.

    Audio is normalized as preprocessor_config.json says; without that file it is not. Raises `UserError` for a folder without
    configuration or weights, another model, and a part or an option that the Transformer here does not have.
    """
    with about(folder):
        if not (folder / CONFIG).is_file() and (folder / ADAPTER).is_file():
            raise UserError(f"it holds an adapter ({ADAPTER}) and no model: merge the adapter into its model, and give the folder of that")
        values = read_json(folder / CONFIG)
        if values.get("model_type") == OWN:
            return read_export(folder / WEIGHTS[0])
        config = config_from(values, normalizes(folder))
        with contextlib.ExitStack() as opened:
            held = _weights(folder, opened)
            heads = {head for name in held for prefix, head in FINE_TUNED.items() if name.startswith(prefix)}
            held = without_identity(without_prefix(held, PREFIXES), their_name(PROJECTION), config)
            model = filled(config, held, their_name, (*PRETRAINING, *FINE_TUNED))
    model.heads = " and ".join(sorted(heads))
    return model


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `UserError` if the file is missing or holds something else."""
    try:
        if not file.is_file():
            raise UserError(f"it holds no {file.name}")
        if file.stat().st_size > (LARGEST_INDEX if file.name.endswith(".index.json") else LONGEST):
            raise UserError(f"its {file.name} is too large")
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"its {file.name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"its {file.name} is not valid JSON ({short(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"its {file.name} is not a JSON object")
    return content


def reads(values: Mapping[str, Any]) -> bool:
    """Whether the Transformer here can hold what a config.json describes."""
    if values.get("model_type") == OWN:
        return True
    if values.get("quantization_config") is not None:
        return False
    try:
        config_from(values, False)
    except UserError:
        return False
    return True


def check_weights(folder: Path) -> str:
    """The name of a folder's file of weights, or of its index. Raises `UserError` if weights are missing, damaged or quantized."""
    with contextlib.ExitStack() as opened:
        for name, tensor in _weights(folder, opened).items():
            if tensor.dtype not in FLOATS and not name.endswith(COUNTS):
                raise UserError(f"{short(name)} is {tensor.dtype}: quantized weights are not read, give the float model it was made from")
    return next(name for name in WEIGHTS if (folder / name).is_file())


def config_from(values: Mapping[str, Any], normalize: bool) -> HubertConfig:
    """Our configuration for a config.json. Raises `UserError` for another model, and for an option that we do not compute."""
    kind = values.get("model_type")
    if kind not in MODELS:
        reason = f" ({OTHERS[kind]})" if isinstance(kind, str) and kind in OTHERS else ""
        raise UserError(
            f"its model_type is {short(repr(kind))}{reason}, which the Transformer here cannot hold: it holds {' and '.join(MODELS)}"
        )
    if values.get("quantization_config") is not None:
        raise UserError("its weights are quantized (quantization_config), which is not read: give the float model that it was made from")
    for key, wanted in FIXED.items():
        if values.get(key, wanted) != wanted:
            what = "an adapter, " if "adapter" in key else ""
            raise UserError(f"it has {what}{key}={short(repr(values[key]))}, which the Transformer here cannot hold (only {wanted!r})")
    mode = values.get("feat_extract_norm", "group")
    if mode not in MODES:
        raise UserError(f"feat_extract_norm={short(repr(mode))} must be one of {', '.join(MODES)}")
    ours = {own: values.get(key, default) for key, (own, default) in KEYS.items()}
    sizes = [values.get(key, default) for key, default in CONVOLUTIONS.items()]
    if any(not isinstance(part, (list, tuple)) or not 0 < len(part) <= MOST_LAYERS or set(map(type, part)) != {int} for part in sizes):
        raise UserError(f"{', '.join(CONVOLUTIONS)} must be lists of whole numbers")
    if len({len(part) for part in sizes}) != 1:
        raise UserError(f"{', '.join(CONVOLUTIONS)} must be of one length, not {', '.join(str(len(part)) for part in sizes)}")
    layers = tuple(zip(*sizes, strict=True))
    text = "default" if layers == CONV_FEATURE_LAYERS["default"] else str(list(layers))
    return stored_config(
        "transformer", {**ours, "extractor_mode": MODES[mode], "conv_feature_layers": text, "normalize": normalize, "normalize_eps": EPS}
    )


def normalizes(folder: Path) -> bool:
    """Whether preprocessor_config.json asks for normalized audio."""
    if not (folder / PREPROCESSOR).is_file():
        return False
    values = read_json(folder / PREPROCESSOR)
    rate, normalize = values.get("sampling_rate", SAMPLE_RATE), values.get("do_normalize", True)
    if rate != SAMPLE_RATE:
        raise UserError(f"it was trained on audio of {short(repr(rate))} Hz: models here take {SAMPLE_RATE} Hz")
    if not isinstance(normalize, bool):
        raise UserError(f"do_normalize={short(repr(normalize))} must be true or false")
    return normalize


def _weights(folder: Path, opened: contextlib.ExitStack) -> dict[str, Held]:
    """The tensors of a folder; they can be read from their files while `opened` is open."""
    for name in WEIGHTS:
        if not (folder / name).is_file():
            continue
        files = [name]
        if name.endswith(".index.json"):
            index = read_json(folder / name).get("weight_map")
            parts = sorted(set(map(str, index.values()))) if isinstance(index, dict) else []
            suffix = SUFFIXES[name.startswith("pytorch_model.")]
            if not parts or not all(re.fullmatch(r"[\w.-]+", part) and part.endswith(suffix) for part in parts):
                raise UserError(f"its {name} names no {suffix} files of this folder")
            files = parts
        held: dict[str, Held] = {}
        for file in files:
            if not (folder / file).is_file():
                raise UserError(f"it lacks {short(file)}, which {name} names: fetch the folder again")
            part = _safetensors(folder / file, opened) if file.endswith(".safetensors") else _torch(folder / file, opened)
            if twice := held.keys() & part.keys():
                raise UserError(f"{short(min(twice))} is in two of its files")
            held.update(part)
        return held
    raise UserError(f"it holds {CONFIG}, but no weights: expected {WEIGHTS[0]} or {WEIGHTS[2]}, or one of them in parts with its index")


def _safetensors(file: Path, opened: contextlib.ExitStack) -> dict[str, Held]:
    dtypes = {"F64": torch.float64, **{name: dtype for dtype, name in NAMES.items()}}
    try:
        stream = opened.enter_context(safe_open(file, framework="pt"))
        found = {}
        for name in stream.keys():  # noqa: SIM118 (not a mapping)
            part = stream.get_slice(name)
            dtype = part.get_dtype()
            found[name] = Held(dtypes.get(dtype, dtype), tuple(part.get_shape()), lambda name=name: stream.get_tensor(name))  # type: ignore[misc]
        return found
    except SafetensorError as error:
        raise UserError(f"{file.name} is truncated or damaged: {short(error)}") from error


def _torch(file: Path, opened: contextlib.ExitStack) -> dict[str, Held]:
    stream = opened.enter_context(TorchFile(file))
    if not isinstance(stream.content, dict):
        raise UserError(f"{file.name} holds no weights by name")
    return held_in(stream, stream.content)
