"""Writing a model as one safetensors file: weights, and its configuration and origin as metadata.

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
    """Write a HuBERT to `path` (.safetensors), which `hubert_eff.load` reads back. The same model gives the same bytes.

    A w1a1 model is packed: one bit per weight; scales and biases of binary layers stay float32. `packed=False` writes its float weights
    instead, which can be trained on, as those of other models. dtype: fp32, fp16 or bf16, what the rest is kept in; a model read from an
    fp16 file computes in float32, one from a bf16 file in bfloat16. int8: a float model quantized by `hubert_eff.quantize`, the rest in
    fp32; one that is quantized already keeps its codes at each dtype. fuse: fold norms first, as `hubert_eff.fuse`. encoder_only: of a
    fine-tuned model, leave out the heads. source: the checkpoint it comes from, of which the base name is kept; notes: more to say, as
    text by name. The label embeddings, which only pre-training uses, are left out. Warns of scales that never saw data.
    Raises `UserError` for another model or suffix, a fine-tuned one without `encoder_only`, one that `load` could not build again
    (a module or a function of it was changed), a packed model where float weights are wanted, a fused one-bit model, weights that are not
    finite or too large for fp16, and a note that is no text, or is named as what the file says of itself.
    """
    if not isinstance(model, HubertModel):
        raise UserError(f"cannot export a {type(model).__name__}: expected a HubertModel, as is the `hubert` of a recognizer")
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
            warnings.warn(said, stacklevel=2)
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
            raise UserError(f"the note '{name}' is no text: {text!r:.100}")
    weights = tensors(model, DTYPES[dtype], LABEL_EMBEDDINGS)
    found = {name: (NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)) for name, tensor in weights.items()}
    try:
        rebuilt = structure_of(metadata, found)
        compare(rebuilt, metadata, found)
        _compare_modules(model, rebuilt)
    except UserError as error:
        raise UserError(
            f"cannot export this model, which could not be read back ({error}): export the one that it was made from, by a "
            "change of its modules"
        ) from error
    with replacing(path) as temporary:
        save_file(weights, temporary, metadata)
        sort_metadata(temporary)


def _compare_modules(model: HubertModel, rebuilt: HubertModel) -> None:
    """Raise `UserError` where a module of the model, or a function that it holds, such as an activation, is not what `load` would build."""
    ours, theirs = _computing(model), _computing(rebuilt)
    for name in ours.keys() | theirs.keys():
        if ours.get(name) != theirs.get(name):
            raise UserError(f"'{name}' is {ours.get(name, 'there')}, where the configuration has {theirs.get(name, 'nothing')}")


def _computing(model: HubertModel) -> dict[str, str]:
    """What computes in a model, by its place: classes of modules, and functions that are their attributes."""
    found = {}
    for path, module in model.named_modules():
        found[path] = f"{type(module).__module__}.{type(module).__qualname__}"
        functions = {key: value for key, value in vars(module).items() if isinstance(value, FUNCTIONS)}
        found.update({f"{path}.{key}": f"{value.__module__}.{value.__qualname__}" for key, value in functions.items()})
    return found


def require_no_heads(model: HubertModel) -> None:
    """Raises `UserError` for the encoder of a fine-tuned model, whose heads a file has no place for."""
    if model.heads:
        raise UserError(
            f"this model is fine-tuned, and what is written here has no place for its {model.heads}: keep the checkpoint for `hubert-eff "
            "transcribe`, or write all of it by --out or export_recognizer; to export the encoder alone, say so by --encoder-only "
            "(encoder_only=True)"
        )


def sort_metadata(file: Path) -> None:
    """Put the metadata in the header of a safetensors file, which come in another order in each process, in that of their names."""
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size  # the same characters, and spaces behind them
        stream.seek(8)
        stream.write(text.ljust(size))


def _policy_name(config: HubertConfig) -> str:
    if config.quant == "none":
        return ""
    return "own" if config.quant_policy.lstrip().startswith("{") else config.quant_policy
