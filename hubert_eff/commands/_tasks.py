"""The option `--task` of all commands on SUPERB's tasks."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

HELP = "short names of tasks (superb list shows them), separated by spaces or commas, or all"


def add_task(parser: ArgumentParser, *, required: bool = False) -> None:
    """Add the option to a parser; it means all tasks where it is left out, unless it is required."""
    said = HELP if required else f"{HELP} (default: all)"
    parser.add_argument("--task", nargs="+", required=required, default=["all"], metavar="TASK", help=said)


def names_of(words: Sequence[str]) -> list[str]:
    """The names of tasks in the words of the option: `ks,sid er` and `ks sid er` name the same three."""
    return " ".join(words).replace(",", " ").split()
