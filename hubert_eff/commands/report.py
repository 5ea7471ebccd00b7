"""`hubert-eff report [RUN_DIR ...] --out DIR`: one page of training curves, costs, quality over cost, shares of time and module trees."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hubert-eff report`."""
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="RUN_DIR",
        help="folders that hold, at any depth, training logs (a run's save_dir), results of SUPERB tasks (result.json) or bench.json",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for report.html, its figures and tables")
    parser.add_argument("--json", action="store_true", help="print the paths written as JSON")


def run(args: argparse.Namespace) -> int:
    """Write the report and say where; returns 0."""
    from ..errors import printable, require
    from ..reports.page import collect, write_report

    require("matplotlib", "plot", "the report")
    found = collect(args.folders)
    written = write_report(found, args.out)
    if args.json:
        print(json.dumps({"written": [str(path) for path in written], "left_out": [printable(text) for text in found.left_out]}))
    else:
        for training in found.runs:
            print(training)
        for text in found.left_out:
            print(f"left out: {printable(text)}", file=sys.stderr)
        print(f"{written[0]} and {len(written) - 1} files beside it")
    return 0
