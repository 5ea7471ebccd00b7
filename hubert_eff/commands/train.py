"""`hubert-eff train NAME`: the same run as `fairseq-hydra-train`, with the plug-in and the folder of the configuration filled in."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from typing import Any

from ..errors import UserError

USER_DIR = "common.user_dir"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the sub-command."""
    parser.add_argument(
        "name", metavar="NAME", help="name of a configuration, such as conformer_s, or KIND/NAME, such as quantize/conformer_s_w1a1"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="OVERRIDE",
        help="SECTION.KEY=VALUE, e.g. task.data=DIR, or GROUP=MEMBER, such as optim=scaled_adam; relative paths start from this folder",
    )  # fmt: skip
    parser.add_argument("--verbose", action="store_true", help="print the whole log; hydra_train.log always has it")
    parser.add_argument("--dry-run", action="store_true", help="print the fairseq command and do not run it")


def run(args: argparse.Namespace) -> int:
    """Check the configuration, then become fairseq-hydra-train: it receives the signals, and its exit code is that of this command."""
    from ..recipes.base import check_model, command_line, readable, training
    from ..utils.configurations import check_half_precision, find_configuration, load_config

    written = load_config(args.name, args.overrides)
    check_model(written, args.overrides)
    missing = [key for key in _missing(written) if key != USER_DIR]
    if missing:
        raise UserError(f"{args.name} needs {' '.join(f'{key}=...' for key in missing)} ('hubert-eff config {args.name}' shows all keys)")
    path = find_configuration(args.name)
    words = training(path.parent.name, path.stem, {}, *args.overrides)
    words = words if args.verbose else readable(words)
    if any(word.lstrip("+").startswith(f"{USER_DIR}=") for word in args.overrides):  # the user's own plug-in, which imports this one
        words = tuple(word for word in words if word in args.overrides or not str(word).startswith(f"{USER_DIR}="))
    if args.dry_run:
        print(shlex.join(map(str, words)))
        return 0
    common = written["common"]
    check_half_precision(**{key: bool(common.get(key, False)) for key in ("fp16", "amp", "cpu")})
    line = command_line(*words)
    # hides warnings of hydra, fairseq and torch about each other, about which users can do nothing; this package logs its own
    environment = os.environ if args.verbose else {"PYTHONWARNINGS": "ignore", **os.environ}
    sys.stdout.flush()
    os.execve(line[0], line, environment)


def _missing(values: dict[str, Any], above: str = "") -> list[str]:
    """Keys without a value, which the user must give."""
    found: list[str] = []
    for key, value in values.items():
        found += _missing(value, f"{above}{key}.") if isinstance(value, dict) else [f"{above}{key}"] * (value == "???")
    return found
