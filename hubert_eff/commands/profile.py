"""`hubert-eff profile PRESET|CHECKPOINT`: parameters, storage and operations, by module."""

from __future__ import annotations

import argparse
import json
import sys

from ..errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `hubert-eff profile`."""
    parser.add_argument("model", metavar="PRESET|CHECKPOINT", help="name of a preset, or path of a checkpoint")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the 16 kHz input (default: 10)")
    parser.add_argument("--depth", type=int, default=None, help="levels of modules shown (default: 3; with --json: all)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def run(args: argparse.Namespace) -> int:
    """Profile and print; returns 0."""
    from ..profiling import profile
    from ..profiling.report import render, render_text

    if args.depth is not None and args.depth < 0:
        raise UserError(f"--depth {args.depth} must be 0 or more")
    result = profile(args.model, seconds=args.seconds)
    depth = 3 if args.depth is None else args.depth
    if args.json:
        print(json.dumps(result.to_dict(args.depth), indent=2))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(render(result, depth))
    else:
        print(render_text(result, depth), end="")
    return 0
