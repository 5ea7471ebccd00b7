"""`hubert-eff demo`: every step from a small synthetic corpus to an evaluated model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from ..recipes.demo import Demo, table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="folder for all results (default: demo)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, not as a table")


def run(args: argparse.Namespace) -> int:
    """Run the steps that are not finished; print their results."""
    demo = Demo(args.out)
    results = demo.run()
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        Console(width=max(Console().width, 110)).print(table(results, demo.out))
    return 0
