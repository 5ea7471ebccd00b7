"""`hubert-eff export CHECKPOINT|PRESET --out model.safetensors`: one file to ship, with a model card beside it."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

from ..errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hubert-eff export`."""
    parser.add_argument("model", metavar="CHECKPOINT|PRESET", help="a checkpoint, an export, or a preset (with random weights)")
    parser.add_argument("--average", type=int, metavar="N", help="the mean of the last N checkpoints of a run: CHECKPOINT is its save_dir")
    parser.add_argument("--out", type=Path, metavar="FILE", help="model.safetensors; its model card is written beside it, model.md")
    parser.add_argument(
        "--onnx", type=Path, metavar="FILE",
        help="write model.onnx (too): float32, fused, of dynamic length; a one-bit model in its form of +-1 in floats",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16", "bf16"), default="fp32",
        help="what float tensors are kept in: fp16 is read back to compute in float32, bf16 to compute in bfloat16 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--float", action="store_true", help="float weights of a one-bit model, which can be trained on, in place of bits")
    parser.add_argument("--fuse", action="store_true", help="fold BatchNorms and scales into weights first (not of one-bit models)")
    parser.add_argument("--encoder-only", action="store_true", help="of a fine-tuned checkpoint, without its CTC layer and decoder")
    parser.add_argument("--policy", default="default", help="policy of a preset's binarised form, PRESET+w1a1 (default: %(default)s)")
    parser.add_argument("--licence", default="", metavar="TEXT", help="licence of the weights, for the model card")
    parser.add_argument("--trained-on", default="", metavar="TEXT", help="training data, for the model card")
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(args: argparse.Namespace) -> int:
    """Write the file and its card, and say how large it is."""
    from ..checkpoints.load import average, last_checkpoints
    from ..checkpoints.open import open_model
    from ..checkpoints.safetensors import is_export, read_metadata
    from ..exporting.onnx import export_onnx, require_onnx, require_onnx_form
    from ..exporting.safetensors import export, require_no_heads
    from ..reports.model_card import write_card
    from ..utils.files import writable

    if args.out is None and args.onnx is None:
        raise UserError("--out FILE.safetensors is needed, or --onnx FILE.onnx")
    if args.out is None and (args.dtype != "fp32" or args.float or args.fuse or args.licence or args.trained_on):
        raise UserError("--dtype, --float, --fuse, --licence and --trained-on say how --out FILE.safetensors is written: it is missing")
    if args.average is not None and args.policy != "default":
        raise UserError("--policy is of a preset, --average of a run's checkpoints, which hold theirs: leave out one of the two")
    if args.policy != "default" and "+" not in args.model:
        raise UserError(f"--policy {args.policy} is of a preset's binarised form, such as conformer-s+w1a1: {args.model} has none")
    for option, path, suffix in (("--out", args.out, ".safetensors"), ("--onnx", args.onnx, ".onnx")):
        if path is not None:
            if path.suffix != suffix:
                raise UserError(f"{option} {path} must end in {suffix}")
            writable(path.parent)
    if args.onnx is not None:
        require_onnx()
    if args.average is None:
        preset_keys = {} if args.policy == "default" else {"quant_policy": args.policy}
        model, name = open_model(args.model, **preset_keys), args.model
    else:
        files = last_checkpoints(args.model, args.average)
        if len(files) < args.average:
            there = f"{args.model} holds {len(files)} checkpoints of different updates, not {args.average}"
            print(f"{there}: the mean of {', '.join(file.name for file in files)}", file=sys.stderr)
        model, name = average(files), f"mean of {', '.join(file.name for file in files)}"
    if not args.encoder_only:
        require_no_heads(model)
    if args.onnx is not None:
        require_onnx_form(model)  # before --out is written
    said = {}
    if args.out is not None:
        source = Path(args.model)
        held = read_metadata(source) if source.is_file() and is_export(source) else {}  # what was said of an export stays said
        said_here = {"licence": args.licence, "trained_on": args.trained_on}
        notes = {key: text or held[key] for key, text in said_here.items() if text or key in held}
        with warnings.catch_warnings(record=True) as said_of_it:
            warnings.simplefilter("always")
            export(
                model, args.out, dtype=args.dtype, packed=not args.float, fuse=args.fuse, encoder_only=args.encoder_only,
                source=Path(name).name, notes=notes,
            )  # fmt: skip
        for warning in said_of_it:
            print(f"hubert-eff export: {warning.message}", file=sys.stderr)
        card, figures = write_card(args.out)
        said = {"file": str(args.out), "card": str(card), **figures}
        if not args.json:
            print(f"{args.out}: {figures['bytes'] / 1e6:.3f} MB, {figures['weights']} weights, the rest {args.dtype}; {card}")
    if args.onnx is not None:
        graph = export_onnx(model, args.onnx)
        said["onnx"] = graph
        if not args.json:
            said_of = f"{graph['difference']:.1e}" + (f" ({graph['share_off']:.1%} by more than 1e-3)" if graph["share_off"] else "")
            print(f"{args.onnx}: {graph['bytes'] / 1e6:.3f} MB, {graph['form']}; onnxruntime differs by at most {said_of}")
    if args.json:
        print(json.dumps(said, indent=2))
    return 0
