"""Tests which of Zipformer's ablations learn, and with which optimizer: trains `zipformer_debug` in each form through fairseq-hydra-train.

    hubert-eff manifest $FSDD --out runs/digits --join 4 --split-by file
    hubert-eff labels runs/digits --out runs/digits/mfcc --features mfcc --clusters 50
    python benchmarks/learning/ablations.py runs/digits runs/digits/mfcc --out runs/ablations

One budget of updates, one split, one seed per run (`--seeds`), the recipe of `debug.yaml`; each optimizer with the rate and schedule of
its group. A model that has learned nothing reaches the share of the most frequent label. Prints a Markdown table as it goes, and writes
it, with the same figures in JSON, beside the logs of the runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from learning import train

FORMS: dict[str, tuple[str, ...]] = {
    "zipformer": (),
    "conformer": ("model.zipformer_block=conformer",),
    "no-nonlinear-attention": ("model.zipformer_nonlinear_attention=false",),
    "not-shared": ("model.zipformer_nonlinear_attention=false", "model.zipformer_share_weights=false"),
    "no-bypass": ("model.zipformer_bypass=false",),
    "layer-norm": ("model.zipformer_norm=layer_norm",),
    "swoosh-r": ("model.zipformer_activation=swoosh_r",),
    "swish": ("model.zipformer_activation=swish",),
    "module-norm": ("model.zipformer_module_norm=true",),
    "no-balancer": ("model.zipformer_balancer=false",),
    "no-whitener": ("model.zipformer_whitener=false",),
    "one-rate": ('model.zipformer_rates="1,1,1"',),
}
OPTIMIZERS: dict[str, tuple[str, ...]] = {"scaled_adam": (), "algorithm-1": ("optimizer.form=paper",), "adam": ("optim=adam",)}


def main() -> None:
    """Train and tabulate."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("data", type=Path, help="directory that `hubert-eff manifest` wrote")
    options.add_argument("labels", type=Path, help="directory that `hubert-eff labels` wrote (MFCC: 100 labels per second)")
    options.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), metavar="FORM", help=f"some of {', '.join(FORMS)}")
    options.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=["scaled_adam", "adam"], help="default: scaled_adam adam")
    options.add_argument("--updates", type=int, default=200, help="updates of each model (default: 200)")
    options.add_argument("--seeds", type=int, nargs="+", default=[1], help="default: 1")
    options.add_argument("--out", type=Path, required=True, help="folder for logs, ablations.json and ablations.md")
    args = options.parse_args()
    if args.updates < 20:
        options.error(f"--updates {args.updates}: at least 20, or there is no speed to tell")
    out, runs = args.out.resolve(), []
    lines = ["| form | optimizer | seed | masked accuracy, valid | most frequent label |", "|---|---|---|---|---|"]
    print(*lines, sep="\n", flush=True)
    for form, optimizer, seed in ((f, o, s) for f in args.forms for o in args.optimizers for s in args.seeds):
        overrides = (*FORMS[form], *OPTIMIZERS[optimizer], f"common.seed={seed}")
        try:
            name = f"{form}-{optimizer}-{seed}"
            run = train("zipformer", args.data.resolve(), args.labels.resolve(), args.updates, out, overrides, name)
        except RuntimeError as error:
            sys.exit(str(error))
        runs.append({"form": form, "optimizer": optimizer, "seed": seed, "overrides": overrides, **run})
        lines.append(f"| {form} | {optimizer} | {seed} | {run['accuracy']:.1%} | {run['majority']:.1%} |")
        print(lines[-1], flush=True)
        (out / "ablations.json").write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")
        (out / "ablations.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
