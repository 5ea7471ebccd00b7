"""One safetensors file that holds a model: weights, and its configuration and origin as metadata. Reading it unpickles nothing.

A one-bit model (w1a1) is written packed, one bit per weight, and read back as a model that runs from bits. docs/export.md describes the
format.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import __version__
from .config import HubertConfig
from .errors import BUILD_ERRORS, UserError, about, short, unknown
from .files import replacing
from .fusing import fuse as fused_copy
from .layers.linear import Linear
from .model import LABEL_EMBEDDINGS, HubertModel
from .registry import encoder_of, stored_config
from .torchfile import structure_only

FORMAT, FORMAT_VERSION = "hubert-eff", "1"
FLOAT, PACKED = "float", "packed"
# fp16 halves the file of a model that computes in float32; a bf16 one computes in bfloat16
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
COMPUTED = {"fp32": torch.float32, "fp16": torch.float32, "bf16": torch.bfloat16}
BLUEPRINT = ("encoder", "config", "weights", "fused", "final_projections")  # metadata that say how a model is built
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.uint8: "U8", torch.bool: "BOOL"}


def export(
    model: HubertModel, path: str | os.PathLike[str], *, dtype: str = "fp32", packed: bool = True, fuse: bool = False,
    encoder_only: bool = False, source: str | os.PathLike[str] = "", notes: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write a HuBERT to `path` (.safetensors), which `hubert_eff.load` reads back. The same model gives the same bytes.

    A w1a1 model is packed: one bit per weight; scales and biases of binary layers stay float32. `packed=False` writes its float weights
    instead, which can be trained on, as those of other models. dtype: fp32, fp16 or bf16, what the rest is kept in; a model read from an
    fp16 file computes in float32, one from a bf16 file in bfloat16. fuse: fold norms first, as `hubert_eff.fuse`. encoder_only: of a
    fine-tuned model, leave out the heads. source: the checkpoint it comes from, of which the base name is kept; notes: more to say, as
    text by name. The label embeddings, which only pre-training uses, are left out. Warns of scales that never saw data.
    Raises `UserError` for another model or suffix, a fine-tuned one without `encoder_only`, one that `load` could not build again
    (rewritten, or with int8 layers), a packed model where float weights are wanted, a fused one-bit model, weights that are not finite or
    too large for fp16, and a note that is no text, or is named as what the file says of itself.
    """
    if not isinstance(model, HubertModel):
        raise UserError(f"cannot export a {type(model).__name__}: expected a HubertModel, as is the `hubert` of a recognizer")
    if not encoder_only:
        require_no_heads(model)
    if Path(path).suffix != ".safetensors":
        raise UserError(f"an export is a .safetensors file, not {path}")
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    from .quant.modules import unstarted
    from .quant.storage import is_packed, tensors

    was_packed = is_packed(model)
    if fuse:
        model = fused_copy(model)
    if was_packed and not packed:
        raise UserError("this model holds one bit per weight: its float weights are in the checkpoint that it was made from")
    if packed and model.config.quant == "w1a1":
        if said := unstarted(model):
            warnings.warn(said, stacklevel=2)
        model = pack_for_file(model, was_packed)
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "encoder": encoder_of(model.config).name,
        "config": json.dumps(model.config.to_dict(), sort_keys=True),
        "weights": PACKED if is_packed(model) else FLOAT,
        "policy": _policy_name(model.config),
        "dtype": dtype,
        "fused": json.dumps(model.fused),
        "final_projections": str(model.final_proj.out_features // model.config.codebook_dim),
        "source": Path(source).name,
    }
    if taken := metadata.keys() & (notes or {}).keys():
        raise UserError(f"a note cannot be called '{min(taken)}': the file says that itself")
    metadata.update(notes or {})
    for name, text in metadata.items():
        if not isinstance(text, str) or text.encode(errors="ignore").decode() != text:
            raise UserError(f"the note '{name}' is no text: {text!r:.100}")
    weights = tensors(model, DTYPES[dtype], LABEL_EMBEDDINGS)
    found = {name: (NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)) for name, tensor in weights.items()}
    try:
        _compare(_structure(metadata, found), metadata, found)
    except UserError as error:
        raise UserError(
            f"cannot export this model, which could not be read back ({error}): export the one that it was made from, by edge.rewrite, "
            "int8 layers or a change of its modules"
        ) from error
    with replacing(path) as temporary:
        save_file(weights, temporary, metadata)
        _sort_metadata(temporary)


def require_no_heads(model: HubertModel) -> None:
    """Raises `UserError` for the encoder of a fine-tuned model, whose heads a file has no place for."""
    if model.heads:
        raise UserError(
            f"this model is fine-tuned, and an export has no place for its {model.heads}: keep the checkpoint for `hubert-eff transcribe`; "
            "to export the encoder alone, say so by --encoder-only (encoder_only=True)"
        )


def _sort_metadata(file: Path) -> None:
    """Put the metadata in the header of a safetensors file, which come in another order in each process, in that of their names."""
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size  # the same characters, and spaces behind them
        stream.seek(8)
        stream.write(text.ljust(size))


def pack_for_file(model: HubertModel, was_packed: bool) -> HubertModel:
    """The packed copy of a w1a1 model of which a file is made."""
    from .quant.packing import packed_copy
    from .quant.storage import fold_moves

    model = copy.deepcopy(model) if was_packed else packed_copy(model)
    fold_moves(model)
    return model


def _policy_name(config: HubertConfig) -> str:
    if config.quant == "none":
        return ""
    return "own" if config.quant_policy.lstrip().startswith("{") else config.quant_policy


def is_export(file: Path) -> bool:
    """Whether a file is in the safetensors format: eight bytes of length, then a JSON object. Raises `UserError` if it cannot be read."""
    try:
        with file.open("rb") as stream:
            head = stream.read(9)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    return len(head) == 9 and head[8:] == b"{"


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata of an export. Raises `UserError` for a safetensors file that is none, or of another version of the format."""
    try:
        with safe_open(file, framework="pt") as stream:
            return _checked(stream.metadata() or {}, file)
    except SafetensorError as error:
        raise UserError(f"{file} is truncated or damaged: {error}") from error


def _checked(metadata: dict[str, str], file: Path) -> dict[str, str]:
    if metadata.get("format") != FORMAT:
        raise UserError(f"{file} is a safetensors file, but no export of hubert-eff")
    version = metadata.get("format_version", "none")
    if version != FORMAT_VERSION:
        by = metadata.get("package_version", metadata.get("version", "?"))
        raise UserError(
            f"{file} is an export of format version {short(version)}, written by hubert-eff {short(by)}: this is hubert-eff "
            f"{__version__}, which reads version {FORMAT_VERSION}; export the model again"
        )
    missing = {*BLUEPRINT, "dtype"} - set(metadata)
    if missing:
        raise UserError(f"{file}: its metadata lack '{min(missing)}'")
    return metadata


def read_export(file: Path) -> HubertModel:
    """The model of an export, in eval mode on the CPU.

    Names, dtypes and shapes are compared with those of the model that the metadata describe before anything of its size is allocated.
    Raises `UserError` for a file that does not hold what it says, and for numbers that no model has: NaN, infinity, scales of zero or
    less.
    """
    with about(file):
        try:
            with safe_open(file, framework="pt") as stream:
                metadata = _checked(stream.metadata() or {}, file)
                held = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118 (not a mapping)
                found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in held.items()}
                model = _structure(metadata, found)
                _compare(model, metadata, found)
                stored = {name: stream.get_tensor(name) for name in found}
        except SafetensorError as error:
            raise UserError(f"{file} is truncated or damaged: {short(error)}") from error
        _check_numbers(stored)
        return _filled(model, stored, metadata)


def _structure(metadata: Mapping[str, str], found: Mapping[str, Any]) -> HubertModel:
    """The model that metadata describe, without storage."""
    if metadata["weights"] not in (FLOAT, PACKED):
        raise unknown("kind of weights", short(metadata["weights"]), (FLOAT, PACKED))
    if metadata["dtype"] not in DTYPES:
        raise unknown("dtype", short(metadata["dtype"]), DTYPES)
    config = stored_config(metadata["encoder"], metadata["config"])
    blocks = {name.split(".", 3)[2] for name in found if name.startswith("encoder.layers.")}
    if config.encoder_layers != len(blocks):
        raise UserError(f"its configuration has {config.encoder_layers} blocks, its weights have {len(blocks)}")
    if not re.fullmatch("[1-9][0-9]{0,3}", metadata["final_projections"]):
        raise UserError(f"final_projections={short(metadata['final_projections'])} must be a number of codebooks")
    if metadata["weights"] == PACKED and config.quant != "w1a1":
        raise UserError(f"its weights are packed bits, but its configuration says quant={config.quant}, not w1a1")
    try:
        return copy.deepcopy(_blueprint(*(metadata[name] for name in BLUEPRINT)))
    except UserError:
        raise
    except BUILD_ERRORS as error:
        raise UserError(f"its configuration describes no model that can be built ({short(error)})") from error


@functools.lru_cache(maxsize=4)  # a second file of the same configuration is read several times as fast
def _blueprint(encoder: str, text: str, weights: str, fused: str, copies: str) -> HubertModel:
    return _built(encoder, text, weights, fused, copies, device="meta")


def _built(encoder: str, text: str, weights: str, fused: str, copies: str, *, device: str) -> HubertModel:
    config = stored_config(encoder, text)
    with structure_only() if device == "meta" else nullcontext():
        model = HubertModel(config)
        if copies != "1":
            model.final_proj = Linear(config.encoder_embed_dim, config.codebook_dim * int(copies))
        if weights == PACKED:
            model = pack_for_file(model, False)
        if fused == "true":
            model = fused_copy(model)
    return model


def _compare(model: HubertModel, metadata: Mapping[str, str], found: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Raise `UserError` unless the file holds exactly the tensors of the model."""
    from .quant.storage import layout

    expected = layout(model, DTYPES[metadata["dtype"]], LABEL_EMBEDDINGS)
    for kind, names in (("lacks", expected.keys() - found.keys()), ("has more than its configuration describes,", found.keys() - expected)):
        if names:
            raise UserError(f"the weights do not fit its configuration: it {kind} {short(min(names))} and {len(names) - 1} others")
    for name, (dtype, shape) in expected.items():
        if found[name] != (NAMES[dtype], shape):
            raise UserError(f"the weights do not fit its configuration: {name} is {found[name]}, not {(NAMES[dtype], shape)}")


def _check_numbers(stored: Mapping[str, Tensor]) -> None:
    from .quant.storage import SCALES

    for name, tensor in stored.items():
        if not tensor.is_floating_point():
            continue
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{name} holds numbers that are not finite")
        own = name.rpartition(".")[2]
        if (own in (SCALES, "size") and bool((tensor <= 0).any())) or (own == "running_var" and bool((tensor < 0).any())):
            raise UserError(f"{name} holds {'a scale' if own != 'running_var' else 'a variance'} that is not positive")


def _filled(model: HubertModel, stored: dict[str, Tensor], metadata: Mapping[str, str]) -> HubertModel:
    """The structure with the tensors of the file."""
    from .quant.storage import state_from

    compute = COMPUTED[metadata["dtype"]]
    state = state_from(stored, model, compute)
    model.load_state_dict(state, assign=True)
    if any(t.is_meta for t in model.buffers()):  # what a model makes for itself and does not save, such as mel filters
        model = _built(*(metadata[name] for name in BLUEPRINT), device="cpu")
        model.load_state_dict(state, assign=True)
    if model.fused:
        model = fused_copy(model)  # folds nothing more, but lays weights out as they are read
    model.stored_dtype = DTYPES[metadata["dtype"]]
    return model.eval()
