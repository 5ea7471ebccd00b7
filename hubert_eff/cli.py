"""The `hubert-eff` command: a table of sub-commands, each imported only when it is called.

A sub-command is a module of `hubert_eff.commands` with `add_arguments(parser)` and `run(args) -> int`.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any, NoReturn

from .errors import StepFailed, UserError, printable

COMMANDS = {
    "doctor": "versions, known breakages of this environment and the fix for each",
    "demo": "corpus, labels, pre-training, keyword spotting and profile, on a small synthetic corpus",
    "corpus": "make a small synthetic speech corpus offline",
    "manifest": "check a folder of audio, convert it once to 16 kHz mono, write train.tsv and valid.tsv",
    "recipe": "the two phases of pre-training, from recordings to an export, or what they would need",
    "binarize-recipe": "train at one bit in stages, W32A32 -> W1A2 -> W1A1, each taught by the one before",
    "labels": "k-means labels from MFCC or from a layer of a checkpoint; their quality",
    "profile": "parameters, storage and operations of a preset or a checkpoint; the paper's Table 1",
    "bench": "measured latency, memory and throughput, and where the time goes",
    "export": "one file to ship: packed bits or float weights with a model card, or ONNX",
    "run": "hidden states of audio files, by a checkpoint, an export or a preset",
    "align": "when each letter and word is said, by gradients; whether an encoder reverses time",
    "trends": "mean and variance of every layer over training, and alarms",
    "transcribe": "texts of recordings by a fine-tuned model",
    "superb": "the ten SUPERB tasks through S3PRL: what they need, and running them",
    "report": "training curves, costs, quality over cost and shares of time on one HTML page",
}


def _module(command: str) -> Any:
    return importlib.import_module(f"hubert_eff.commands.{command.replace('-', '_')}")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong on one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message)} (--help lists the options)\n")


def _parser(command: str | None) -> argparse.ArgumentParser:
    parser = _Parser(prog="hubert-eff", description="Speech encoders that are cheap to run.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == command:
            _module(name).add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 failed, 2 bad input (one line on stderr), 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((a for a in arguments if not a.startswith("-")), None)
    try:
        return _run(_parser(command), arguments)
    except KeyboardInterrupt:
        print(f"hubert-eff {command}: interrupted", file=sys.stderr)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one does not wait for what is still at work
        return 130


def _run(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    try:
        args = parser.parse_args(arguments)
    except SystemExit as stop:  # argparse has printed its own line
        return int(stop.code or 0)
    if args.version:
        from . import __version__

        print(__version__)
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    module = _module(args.command)
    try:
        return int(module.run(args))
    except UserError as error:
        print(f"hubert-eff {args.command}: {error}", file=sys.stderr)
        return 2
    except StepFailed as failure:
        print(f"hubert-eff {args.command}: {printable(failure)}", file=sys.stderr)
        return failure.code
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:  # a full disk, a folder that is gone
        print(f"hubert-eff {args.command}: {printable(error)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
