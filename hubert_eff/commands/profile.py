"""`hubert-eff profile PRESET|CHECKPOINT`: parameters, storage and operations, by module; `--table1`: the paper's Table 1 rebuilt."""

from __future__ import annotations

import argparse
import json

from ..config import NOT_NEGATIVE
from ..errors import UserError
from ._numbers import whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hubert-eff profile`."""
    parser.add_argument("models", nargs="*", metavar="PRESET|CHECKPOINT", help="presets or checkpoints; several are compared in one table")
    parser.add_argument(
        "--table1", action="store_true", help="profile the ten models of the paper's Table 1 and show the paper's figures beside ours"
    )
    parser.add_argument(
        "--counter", default=None, metavar="NAME",
        help="how --table1 counts: clean, what the models compute (default); paper, by formulas fitted to the paper's own figures",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=None, help="length of the 16 kHz input in seconds (default: 10)")
    parser.add_argument(
        "--depth", type=whole(NOT_NEGATIVE), default=None, help="number of levels of modules to show (default: 3; with --json: all)"
    )
    parser.add_argument(
        "--bops", choices=("paper", "product"), default="paper",
        help="how to count bit operations of a MAC: the wider operand's width, or the product of both widths (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--device", default=None, metavar="NAME|FILE",
        help="device to estimate times for: a name in configs/device or a file (default: a100); hubert-eff bench --roofline writes one",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Profile and print; returns 0."""
    from ..profiling import profile
    from ..reports import paper_counter, table1
    from ..reports.tables import compare, render, show

    if args.table1:
        given = [*args.models, *(f"--{name}" for name in ("seconds", "depth", "device") if getattr(args, name) is not None)]
        if given:
            raise UserError(f"--table1 has its own models, length and device: leave out {given[0]}")
        counter = args.counter or table1.CLEAN
        rows = table1.table1(args.bops, counter=counter)
        if args.json:
            said = {"remarks": paper_counter.SUMMARY} if counter == table1.PAPER else {}
            print(json.dumps({"bops": args.bops, "counter": counter, **said, "rows": rows}, indent=2))
        else:
            show(table1.render(rows, args.bops, counter))
        return 0
    if args.counter is not None:
        raise UserError(f"--counter {args.counter} is for --table1: leave it out, or ask for --table1")
    if not args.models:
        raise UserError("name a preset or the path of a checkpoint, or ask for --table1")
    seconds = 10.0 if args.seconds is None else args.seconds
    results = [profile(model, seconds, args.bops, args.device or "a100") for model in args.models]
    if args.json:
        values = [result.to_dict(args.depth) for result in results]
        print(json.dumps(values[0] if len(values) == 1 else {"profiles": values}, indent=2))
    elif len(results) == 1:
        show(render(results[0], 3 if args.depth is None else args.depth))
    else:
        show(compare(results))
    return 0
