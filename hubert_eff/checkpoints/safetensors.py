"""Reads exports of this package: one safetensors file with weights, and configuration and origin as metadata. Nothing is unpickled.

docs/export.md describes the format; `hubert_eff.exporting.safetensors` writes it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import __version__
from ..edge import FORMS, rewritten_as
from ..encoders.registry import stored_config
from ..errors import BUILD_ERRORS, UserError, about, short, unknown
from ..layers.linear import Linear
from ..models.fuse import fuse as fused_copy
from ..models.hubert import LABEL_EMBEDDINGS, HubertModel
from ..quant.packing import packed_copy, packed_in_place
from ..quant.quantization import INT8, quantize
from ..quant.runtime.int8 import Int8Linear
from ..quant.storage import SCALES, fold_moves, layout, state_from
from ..utils.collecting import without_collection
from .torchfile import aligned, structure_only

FORMAT, FORMAT_VERSION = "hubert-eff", "1"
FLOAT, PACKED = "float", "packed"
HEADS, RECOGNIZER = "heads.", "recognizer"  # prefix of the heads of a fine-tuned model, and name of its configuration
# fp16 halves the file of a model that computes in float32; a model from a bf16 file computes in bfloat16
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
COMPUTED = {"fp32": torch.float32, "fp16": torch.float32, "bf16": torch.bfloat16}
EDGE = "edge"  # metadata key for the form of a rewritten model
TRAINING, UNTRAINED = "training", "random, never trained"  # what the metadata say of the weights of a preset
BLUEPRINT = ("encoder", "config", "weights", "fused", "final_projections")  # metadata from which a model is built
NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


def is_export(file: Path) -> bool:
    """Whether a file is in the safetensors format: eight bytes of length, then a JSON object. Raises `UserError` if it cannot be read."""
    try:
        with file.open("rb") as stream:
            head = stream.read(9)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    return len(head) == 9 and head[8:] == b"{"


def is_own(file: Path) -> bool:
    """Whether a safetensors file says that it is an export of this package."""
    try:
        with safe_open(file, framework="pt") as stream:
            return (stream.metadata() or {}).get("format") == FORMAT
    except SafetensorError as error:
        raise UserError(f"{file} is truncated or damaged: {short(error)}") from error


def read_metadata(file: Path) -> dict[str, str]:
    """Read the metadata of an export. Raises `UserError` for other safetensors files and for another version of the format."""
    try:
        with safe_open(file, framework="pt") as stream:
            return _checked(stream.metadata() or {}, file)
    except SafetensorError as error:
        raise UserError(f"{file} is truncated or damaged: {error}") from error


def _checked(metadata: dict[str, str], file: Path) -> dict[str, str]:
    if metadata.get("format") != FORMAT:
        raise UserError(f"{file} is a safetensors file, but not an export of hubert-eff")
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
    return {"license" if key == "licence" else key: text for key, text in metadata.items()}  # version 0.1.0 spelled it so


def read_export(file: Path) -> HubertModel:
    """Read the model of an export, in eval mode on the CPU.

    Before memory for the tensors is allocated, their names, dtypes and shapes are compared with those of the model that the metadata
    describe. Raises `UserError` for a file that does not hold what it says, and for invalid numbers: NaN, infinity, scales of zero or less.
    """
    with about(file), without_collection():
        try:
            with safe_open(file, framework="pt") as stream:
                metadata = _checked(stream.metadata() or {}, file)
                names = [name for name in stream.keys() if RECOGNIZER not in metadata or not name.startswith(HEADS)]  # noqa: SIM118
                held = {name: stream.get_slice(name) for name in names}
                found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in held.items()}
                model = structure_of(metadata, found)
                compare(model, metadata, found)
                stored = {name: stream.get_tensor(name) for name in found}
        except SafetensorError as error:
            raise UserError(f"{file} is truncated or damaged: {short(error)}") from error
        check_numbers(stored)
        return _filled(model, stored, metadata)


def read_heads(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read (metadata, tensors of the heads by their names in the recognizer) of an export. Raises `UserError` for a damaged file."""
    with about(file):
        try:
            with safe_open(file, framework="pt") as stream:
                metadata = _checked(stream.metadata() or {}, file)
                names = [name for name in stream.keys() if name.startswith(HEADS)]  # noqa: SIM118 (not a mapping)
                stored = {name: stream.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise UserError(f"{file} is truncated or damaged: {short(error)}") from error
        check_numbers(stored)
        return metadata, {name.removeprefix(HEADS): tensor for name, tensor in stored.items()}


def structure_of(metadata: Mapping[str, str], found: Mapping[str, Any]) -> HubertModel:
    """Build the model that metadata describe, without storage; `found` has the names of its tensors. Raises `UserError` if it cannot."""
    if metadata["weights"] not in (FLOAT, PACKED, INT8):
        raise unknown("kind of weights", short(metadata["weights"]), (FLOAT, PACKED, INT8))
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
    if metadata["weights"] == INT8 and metadata["fused"] != "true":
        raise UserError("its weights are int8, but its metadata do not say that it is fused")
    edge = metadata.get(EDGE, "")
    if edge and edge not in FORMS:
        raise unknown("form for accelerators", short(edge), FORMS)
    try:
        return _built(*(metadata[name] for name in BLUEPRINT), edge=edge, device="meta")
    except UserError:
        raise
    except BUILD_ERRORS as error:
        raise UserError(f"its configuration describes no model that can be built ({short(error)})") from error


def _built(encoder: str, text: str, weights: str, fused: str, copies: str, *, edge: str, device: str) -> HubertModel:
    config = stored_config(encoder, text)
    with structure_only() if device == "meta" else nullcontext():
        model = HubertModel(config)
        if copies != "1":
            model.final_proj = Linear(config.encoder_embed_dim, config.codebook_dim * int(copies))
        if weights == PACKED:
            model = packed_in_place(model)
            fold_moves(model)
        if weights == INT8:
            model = quantize(model)
        elif fused == "true":
            model = fused_copy(model)
        if edge:
            model = rewritten_as(model, edge)
    return model


def compare(model: HubertModel, metadata: Mapping[str, str], found: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Raise `UserError` unless the file holds exactly the tensors of the model."""
    expected = layout(model, DTYPES[metadata["dtype"]], LABEL_EMBEDDINGS)
    for kind, names in (("lacks", expected.keys() - found.keys()), ("has superfluous tensors,", found.keys() - expected)):
        if names:
            raise UserError(f"the weights do not fit its configuration: it {kind} {short(min(names))} and {len(names) - 1} others")
    for name, (dtype, shape) in expected.items():
        if found[name] != (NAMES[dtype], shape):
            raise UserError(f"the weights do not fit its configuration: {name} is {found[name]}, not {(NAMES[dtype], shape)}")


def check_numbers(stored: Mapping[str, Tensor]) -> None:
    """Raise `UserError` for invalid numbers: NaN, infinity, scales of zero or less, negative variances."""
    for name, tensor in stored.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if not all(bool(extreme.isfinite()) for extreme in tensor.aminmax()):  # catches NaN too, without a large temporary
            raise UserError(f"{name} holds numbers that are not finite")
        own = name.rpartition(".")[2]
        if (own in (SCALES, "size") and bool((tensor <= 0).any())) or (own == "running_var" and bool((tensor < 0).any())):
            raise UserError(f"{name} holds {'a scale' if own != 'running_var' else 'a variance'} that is not positive")


def _filled(model: HubertModel, stored: dict[str, Tensor], metadata: Mapping[str, str]) -> HubertModel:
    """Fill the structure with the tensors of the file."""
    compute = COMPUTED[metadata["dtype"]]
    state = {name: aligned(tensor) for name, tensor in state_from(stored, model, compute).items()}
    if model.edge:  # parts of it compute in float16
        dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        state = {name: tensor.to(dtypes[name]) if dtypes[name] == torch.float16 else tensor for name, tensor in state.items()}
    model.load_state_dict(state, assign=True)
    if any(t.is_meta for t in model.buffers()):  # buffers that a model computes and does not save, such as mel filters
        model = _built(*(metadata[name] for name in BLUEPRINT), edge=metadata.get(EDGE, ""), device="cpu")
        model.load_state_dict(state, assign=True)
    if model.fused:
        model = fused_copy(model)  # folds nothing more, but lays weights out in the order in which they are read
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.lay_out()
    model.stored_dtype = DTYPES[metadata["dtype"]]
    return model.eval()


def pack_for_file(model: HubertModel, was_packed: bool) -> HubertModel:
    """The packed copy of a w1a1 model that is written to a file."""
    model = copy.deepcopy(model) if was_packed else packed_copy(model)
    fold_moves(model)
    return model
