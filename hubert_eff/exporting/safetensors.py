"""Writes a model as one safetensors file: weights, with configuration and origin as metadata.

A one-bit model (w1a1) is written packed, one bit per weight, and read back as a model that runs from bits. docs/export.md describes the
format; `hubert_eff.checkpoints.safetensors` reads it.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import BuiltinFunctionType, FunctionType

from safetensors.torch import save_file

from .. import __version__
from ..checkpoints.safetensors import DTYPES, EDGE, FLOAT, FORMAT, FORMAT_VERSION, NAMES, PACKED, compare, pack_for_file, structure_of
from ..config import HubertConfig
from ..encoders.registry import encoder_of
from ..errors import UserError, unknown
from ..models.fuse import fuse as fused_copy
from ..models.hubert import LABEL_EMBEDDINGS, HubertModel
from ..quant.modules import unstarted
from ..quant.quantization import INT8, is_int8, quantize
from ..quant.storage import is_packed, tensors
from ..utils.files import replacing

FUNCTIONS = (FunctionType, BuiltinFunctionType)


def export(
    model: HubertModel, path: str | os.PathLike[str], *, dtype: str = "fp32", packed: bool = True, fuse: bool = False,
    encoder_only: bool = False, source: str | os.PathLike[str] = "", notes: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write a model to one safetensors file, which `load` reads back.

    The same model gives the same bytes. Label embeddings are left out, since only pre-training uses them. It warns of scales that never
    saw data.

    Args:
        model: the model.
        path: the file to write (.safetensors).
        dtype: what float tensors are kept in: fp32, fp16 or bf16. A model read from an fp16 file computes in float32, one from a bf16
            file in bfloat16. `int8` writes a float model as `quantize` makes it, with the rest in fp32; a model that is quantized already
            keeps its codes at each dtype.
        packed: write a w1a1 model with one bit per weight, and scales and biases of binary layers in float32; False to write its float
            weights, which can be trained further.
        fuse: fold norms first, as `fuse` does.
        encoder_only: leave out the heads of a fine-tuned model.
        source: the checkpoint that the model comes from; its base name is kept.
        notes: further metadata, as text by name.

    Raises:
        UserError: the model is not a HubertModel, is fine-tuned (without `encoder_only`), is packed where float weights are wanted, is a
            fused one-bit model, or could not be read back because a module or function of it was changed; weights are not finite or are
            too large for fp16; the path has another suffix; or a note is not text or has the name of other metadata.
    """
    if not isinstance(model, HubertModel):
        raise UserError(f"cannot export a {type(model).__name__}: expected a HubertModel, such as the `hubert` of a recognizer")
    if not encoder_only:
        require_no_heads(model)
    if Path(path).suffix != ".safetensors":
        raise UserError(f"an export is a .safetensors file, not {path}")
    if dtype == INT8:
        model, dtype = quantize(model), "fp32"
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, [*DTYPES, INT8])
    was_packed = is_packed(model)
    if fuse:
        model = fused_copy(model)
    if was_packed and not packed:
        raise UserError("this model holds one bit per weight: its float weights are in the checkpoint that it was made from")
    if packed and model.config.quant == "w1a1":
        if said := unstarted(model):
            warnings.warn(f"written, but {said}", stacklevel=2)
        model = pack_for_file(model, was_packed)
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "encoder": encoder_of(model.config).name,
        "config": json.dumps(model.config.to_dict(), sort_keys=True),
        "weights": PACKED if is_packed(model) else INT8 if is_int8(model) else FLOAT,
        "policy": _policy_name(model.config),
        "dtype": dtype,
        "fused": json.dumps(model.fused),
        "final_projections": str(model.final_proj.out_features // model.config.codebook_dim),
        "source": Path(source).name,
    }
    if model.edge:
        metadata[EDGE] = model.edge
    if taken := metadata.keys() & (notes or {}).keys():
        raise UserError(f"a note cannot be called '{min(taken)}': the file says that itself")
    metadata.update(notes or {})
    for name, text in metadata.items():
        if not isinstance(text, str) or text.encode(errors="ignore").decode() != text:
            raise UserError(f"the note '{name}' is not text: {text!r:.100}")
    weights = tensors(model, DTYPES[dtype], LABEL_EMBEDDINGS)
    found = {name: (NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)) for name, tensor in weights.items()}
    try:
        rebuilt = structure_of(metadata, found)
        compare(rebuilt, metadata, found)
        _compare_modules(model, rebuilt)
    except UserError as error:
        raise UserError(
            f"cannot export this model, which could not be read back ({error}): export the model that it was made from by changing modules"
        ) from error
    with replacing(path) as temporary:
        save_file(weights, temporary, metadata)
        sort_metadata(temporary)


def _compare_modules(model: HubertModel, rebuilt: HubertModel) -> None:
    """Raise `UserError` if a module of the model, or a function in it such as an activation, differs from what `load` would build."""
    ours, theirs = _computing(model), _computing(rebuilt)
    for name in ours.keys() | theirs.keys():
        if ours.get(name) != theirs.get(name):
            raise UserError(f"'{name}' is {ours.get(name, 'there')}, where the configuration has {theirs.get(name, 'nothing')}")


def _computing(model: HubertModel) -> dict[str, str]:
    """What computes in a model, by path: classes of modules, and functions among their attributes."""
    found = {}
    for path, module in model.named_modules():
        found[path] = f"{type(module).__module__}.{type(module).__qualname__}"
        functions = {key: value for key, value in vars(module).items() if isinstance(value, FUNCTIONS)}
        found.update({f"{path}.{key}": f"{value.__module__}.{value.__qualname__}" for key, value in functions.items()})
    return found


def require_no_heads(model: HubertModel) -> None:
    """Raise `UserError` for the encoder of a fine-tuned model, because the file has no place for its heads."""
    if model.heads:
        raise UserError(
            f"this model is fine-tuned, and this form has no place for its {model.heads}: keep the checkpoint for `hubert-eff "
            "transcribe`, or write all of it by --out or export_recognizer; to export the encoder alone, use --encoder-only "
            "(encoder_only=True)"
        )


def sort_metadata(file: Path) -> None:
    """Sort the metadata in the header of a safetensors file by name; their order differs from process to process."""
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size  # the same characters, padded with spaces
        stream.seek(8)
        stream.write(text.ljust(size))


def _policy_name(config: HubertConfig) -> str:
    if config.quant == "none":
        return ""
    return "own" if config.quant_policy.lstrip().startswith("{") else config.quant_policy
