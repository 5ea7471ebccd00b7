"""`hubert-eff binarize-recipe`: a W1A1 model, trained by way of a float model and a W1A2 model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..config import COUNT
from ..recipes.base import plan_text
from ..recipes.binarize import Binarization
from ..reports.tables import plain_table, show
from ._numbers import whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("data", type=Path, help="folder that `hubert-eff manifest` wrote")
    parser.add_argument("labels", type=Path, help="folder that `hubert-eff labels` wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the stages: DIR/float, DIR/w1a2, DIR/w1a1")
    parser.add_argument(
        "--config",
        default="debug",
        metavar="NAME",
        help="configurations pretrain/NAME.yaml and quantize/NAME_distill.yaml in configs (default: debug)",
    )
    parser.add_argument(
        "--teacher", type=Path, metavar="FILE", help="a float checkpoint that replaces the first stage; it may be stock HuBERT"
    )
    parser.add_argument(
        "--updates", type=whole(COUNT), nargs="+", default=[], metavar="N", help="updates of each stage (default: the files')"
    )
    parser.add_argument(
        "--policy",
        default="",
        metavar="POLICY",
        help="policy that says what is binarized: default | paper | a YAML file (default: the configuration's)",
    )
    parser.add_argument(
        "--taught-by-float",
        action="store_true",
        default=None,
        help="distill all stages from the float model (default: from the stage before)",
    )
    parser.add_argument(
        "--one-schedule", action="store_true", default=None, help="use one learning-rate schedule over all stages (default: one for each)"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further keys of the configurations, for all stages")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the commands, and stop")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, not as a table")


def run(args: argparse.Namespace) -> int:
    """Run the stages that are not finished; print what they reached."""
    recipe = Binarization(
        args.data, args.labels, args.out, args.config, args.teacher, args.updates, args.policy, args.set, args.taught_by_float,
        args.one_schedule,
    )  # fmt: skip
    if args.dry_run:
        steps = recipe.plan()
        print(json.dumps({"steps": steps}, indent=2) if args.json else plan_text(steps))
        return 0
    done = recipe.run()
    if args.json:
        print(json.dumps(done, indent=2))
        return 0
    table = plain_table("stage", "updates", "masked accuracy, valid", "most frequent label", "checkpoint")
    for stage, figures in done.items():
        table.add_row(stage, f"{figures['updates']:.0f}", f"{figures['accuracy']:.1%}", f"{figures['majority']:.1%}", figures["checkpoint"])
    show(table)  # a narrow terminal gets plain text, so that no path is cut off
    return 0
