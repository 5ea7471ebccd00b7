"""`hubert-eff export CHECKPOINT|PRESET --out model.safetensors | --hf DIR | --pt2 FILE | --onnx FILE`: what is shipped, and its card."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from ..models.hubert import HubertModel
    from ..recognition import Recognizer

DTYPE_SPELLINGS = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hubert-eff export`."""
    parser.add_argument("model", metavar="CHECKPOINT|PRESET", help="a checkpoint, an export, or a preset (with random weights)")
    parser.add_argument("--average", type=int, metavar="N", help="average the last N checkpoints of a run; CHECKPOINT is then its save_dir")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file model.safetensors; its model card model.md is written beside it")
    parser.add_argument(
        "--onnx", type=Path, metavar="FILE",
        help="write model.onnx (too): float32, fused, of dynamic length; a one-bit model in its form of +-1 in floats; of a recognizer its "
        "CTC layer's log-probabilities",
    )  # fmt: skip
    parser.add_argument(
        "--edge", action="store_true",
        help="float models only: write --out and --onnx for accelerators: channels first, head by head, LayerNorm and softmax that stay "
        "finite in half precision; with --dtype fp16 the model computes in float16",
    )  # fmt: skip
    parser.add_argument(
        "--pt2", type=Path, metavar="FILE",
        help="write model.pt2 (too): a torch.export program, float32, fused, of dynamic batch and length, which torch alone runs; of a "
        "recognizer its CTC layer's log-probabilities",
    )  # fmt: skip
    parser.add_argument(
        "--hf", type=Path, metavar="DIR",
        help="a folder for transformers, with a README.md: a Transformer becomes its HubertModel, a recognizer HubertForCTC; others "
        "and one-bit models are read after `import hubert_eff.hf`",
    )  # fmt: skip
    parser.add_argument("--base-model", default="", metavar="NAME", help="model that it was trained from, for the README.md of --hf")
    parser.add_argument(
        "--dtype", type=lambda name: DTYPE_SPELLINGS.get(name, name), choices=("fp32", "fp16", "bf16", "int8"), default="fp32",
        help="what float tensors are kept in: fp16 is read back to compute in float32 (with --edge in float16), bf16 in bfloat16; "
        "int8: the encoder's linear layers of a float model, which is fused, and all else, such as a CTC layer, in fp32 (default: "
        "%(default)s)",
    )  # fmt: skip
    parser.add_argument("--float", action="store_true", help="write a one-bit model's float weights, which can be trained, not its bits")
    parser.add_argument("--fuse", action="store_true", help="fold BatchNorms and scales into weights first (float models only)")
    parser.add_argument("--encoder-only", action="store_true", help="leave out the CTC layer and the decoder of a fine-tuned checkpoint")
    parser.add_argument("--policy", default="default", help="policy for the binarized form of a preset, PRESET+w1a1 (default: %(default)s)")
    parser.add_argument("--license", "--licence", default="", metavar="TEXT", help="license of the weights, for the model card")
    parser.add_argument("--trained-on", default="", metavar="TEXT", help="training data, for the model card")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(args: argparse.Namespace) -> int:
    """Write the file or the folder and its card, and say how large it is."""
    from ..checkpoints.load import average, keep_keys, last_checkpoints
    from ..checkpoints.open import open_model
    from ..checkpoints.safetensors import TRAINING, UNTRAINED, is_export, is_own, read_metadata
    from ..edge import rewrite
    from ..exporting.huggingface import export_folder, require_ctc
    from ..exporting.onnx import export_onnx, require_onnx, require_onnx_form
    from ..exporting.pt2 import export_pt2, require_program
    from ..exporting.recognizer import export_recognizer
    from ..exporting.safetensors import export, require_no_heads
    from ..quant.quantization import INT8, quantize
    from ..recognition import Recognizer
    from ..reports.model_card import write_card, write_readme
    from ..utils.evaluating import evaluation_copy
    from ..utils.files import writable

    if args.out is args.onnx is args.hf is args.pt2 is None:
        raise UserError("--out FILE.safetensors is needed, or --hf DIR, --pt2 FILE.pt2 or --onnx FILE.onnx")
    said_dtype = args.dtype != "fp32" and not (args.edge and args.onnx is not None)
    if args.out is None and args.hf is None and (said_dtype or args.float or args.license or args.trained_on):
        raise UserError(
            "--dtype, --float, --license and --trained-on say how --out FILE.safetensors or --hf DIR is written: both are missing"
        )
    if args.fuse and (args.out is None or args.hf is not None):
        raise UserError("--fuse says how --out FILE.safetensors is written: " + ("--hf DIR is not fused" if args.hf else "it is missing"))
    if args.edge and (args.hf is not None or args.pt2 is not None or args.out is args.onnx is None):
        raise UserError("--edge says how --out FILE.safetensors and --onnx FILE.onnx are written, not --hf and not --pt2")
    if args.edge and args.dtype == "bf16":
        raise UserError("--edge writes float32 or float16 (--dtype fp16), not bf16")
    if args.base_model and args.hf is None:
        raise UserError("--base-model is for the README.md of --hf DIR, which is missing")
    if args.average is not None and args.policy != "default":
        raise UserError("--policy is for a preset, and --average for checkpoints, which hold their own policy: leave out one of the two")
    if args.policy != "default" and "+" not in args.model:
        raise UserError(f"--policy {args.policy} is for a preset's binarized form, such as conformer-s+w1a1: {args.model} has none")
    for option, path, suffix in (("--out", args.out, ".safetensors"), ("--onnx", args.onnx, ".onnx"), ("--pt2", args.pt2, ".pt2")):
        if path is not None:
            if path.suffix != suffix:
                raise UserError(f"{option} {path} must end in {suffix}")
            writable(path.parent)
    if args.hf is not None:
        writable(args.hf)
    if args.onnx is not None:
        require_onnx()
    if args.average is None:
        preset_keys = {} if args.policy == "default" else {"quant_policy": args.policy}
        model, name = open_model(args.model, **preset_keys), args.model
    else:
        files = last_checkpoints(args.model, args.average)
        if len(files) < args.average:
            there = f"{args.model} holds {len(files)} checkpoint{'s' * (len(files) > 1)} of different updates, not {args.average}"
            taken = f"the mean of {', '.join(file.name for file in files)}" if len(files) > 1 else f"{files[0].name} is exported as it is"
            print(f"{there}: {taken}; to keep more, train with {keep_keys(args.average)}", file=sys.stderr)
        model, name = average(files), f"mean of {', '.join(file.name for file in files)}"
    if args.edge and model.config.quant != "none":
        bits = "one-bit" if model.config.quant == "w1a1" else f"binarized ({model.config.quant})"
        raise UserError(f"--edge takes float models; this one is {bits}: leave out --edge")
    whole: HubertModel | Recognizer = model
    if args.average is None and model.heads and not args.encoder_only:
        whole = _with_heads(model, args.model)
    elif not args.encoder_only:
        require_no_heads(model)
    if args.onnx is not None:
        require_onnx_form(whole)  # checked before --out is written
    if args.edge:
        if whole is not model:
            raise UserError("--edge writes encoders: leave out a recognizer's CTC layer and decoder by --encoder-only")
        whole = model = rewrite(model, half=args.dtype == "fp16", stable=True)
    if args.pt2 is not None:
        require_program(whole)
    if args.hf is not None and isinstance(whole, Recognizer):
        require_ctc(whole)
    float_whole, dtype = whole, args.dtype
    if dtype == INT8:
        if isinstance(whole, Recognizer):
            if args.hf is not None or args.onnx is not None:
                raise UserError("--dtype int8 of a recognizer is for --out FILE.safetensors: --hf and --onnx write floats")
            whole = evaluation_copy(whole)
            whole.hubert = quantize(whole.hubert)  # CTC layer and decoder stay float
        else:
            whole = model = quantize(model)
        dtype = "fp32"
    said: dict[str, Any] = {}
    source = Path(args.model)
    held = read_metadata(source) if source.is_file() and is_export(source) and is_own(source) else {}  # its notes are kept
    is_preset = args.average is None and not source.exists()  # as `open_model` decides
    said_here = {"license": args.license, "trained_on": args.trained_on, TRAINING: UNTRAINED if is_preset else ""}
    notes = {key: text or held[key] for key, text in said_here.items() if text or key in held}
    training = notes.get(TRAINING, "")
    weights_are = f"; weights: {training}" if training else ""
    how = {"dtype": dtype, "packed": not args.float, "encoder_only": args.encoder_only, "source": Path(name).name, "notes": notes}
    if args.out is not None:
        with _warnings_said():
            if isinstance(whole, Recognizer):
                export_recognizer(whole, args.out, fuse=args.fuse, **{key: value for key, value in how.items() if key != "encoder_only"})
            else:
                export(model, args.out, fuse=args.fuse, **how)
        card, figures = write_card(args.out)
        said = {"file": str(args.out), "card": str(card), **figures}
        if not args.json:
            heads = f", with its {model.heads}" if isinstance(whole, Recognizer) else ""
            print(f"{args.out}: {figures['bytes'] / 1e6:.3f} MB, {_form(figures['weights'], dtype)}{heads}{weights_are}; {card}")
    if args.hf is not None:
        with _warnings_said():
            metadata = export_folder(whole, args.hf, **how)
        card, figures = write_readme(args.hf, metadata, args.base_model)
        said["hf"] = {"folder": str(args.hf), "card": str(card), **figures}
        if not args.json:
            print(f"{args.hf}: {figures['bytes'] / 1e6:.3f} MB, {_form(figures['weights'], dtype)}{weights_are}; {card}")
    if args.pt2 is not None:
        program = export_pt2(float_whole, args.pt2, training)
        said["pt2"] = program
        if not args.json:
            what = " and ".join(program["outputs"])
            off = f"{program['difference']:.1e}"
            print(f"{args.pt2}: {program['bytes'] / 1e6:.3f} MB, {what}; differs from the model by at most {off}{weights_are}")
    if args.onnx is not None:
        graph = export_onnx(whole, args.onnx, training)
        said["onnx"] = graph
        if not args.json:
            said_of = f"{graph['difference']:.1e}" + (f" ({graph['share_off']:.1%} by more than 1e-3)" if graph["share_off"] else "")
            print(f"{args.onnx}: {graph['bytes'] / 1e6:.3f} MB, {graph['form']}; onnxruntime differs by at most {said_of}{weights_are}")
    if args.json:
        print(json.dumps(said | ({TRAINING: training} if training else {}), indent=2))
    return 0


def _form(weights: str, dtype: str) -> str:
    """How a file holds its weights, for a line of output."""
    return f"float weights in {dtype}" if weights == "float" else f"{weights} weights, the rest {dtype}"


@contextmanager
def _warnings_said() -> Iterator[None]:
    """Print warnings that are raised inside as lines of the command."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield
    for warning in said:
        print(f"hubert-eff export: warning: {warning.message}", file=sys.stderr)


def _with_heads(encoder: HubertModel, source: str) -> Recognizer:
    """The fine-tuned model of a checkpoint or an export of ours. Raises `UserError` for heads of other packages' models."""
    from ..exporting.safetensors import require_no_heads
    from ..recognition import load_recognizer

    try:
        return load_recognizer(source)
    except UserError:
        require_no_heads(encoder)
        raise
