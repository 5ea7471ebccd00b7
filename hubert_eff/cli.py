"""The `hubert-eff` command: a table of sub-commands, each imported only when it is called.

A sub-command is a module of `hubert_eff.commands` with `add_arguments(parser)` and `run(args) -> int`.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from .errors import StepFailed, UserError, printable
from .utils.signals import say_stopped, stoppable

GROUPS = {
    "Data": ("corpus", "manifest", "labels"),
    "Train": ("demo", "list", "config", "train", "recipe", "binarize-recipe"),
    "Evaluate": ("superb", "transcribe", "align"),
    "Ship": ("export", "run", "bench"),
    "Inspect": ("doctor", "profile", "trends", "report"),
}
COMMANDS = {
    "doctor": "versions, known breakages of this environment and the fix for each",
    "config": "a training configuration as a whole, with overrides; the names of configurations and groups",
    "list": "presets with their sizes and costs, and the configurations that train them",
    "train": "one training run of a configuration: fairseq-hydra-train with the plug-in filled in",
    "demo": "corpus, labels, pre-training, keyword spotting and profile, on a small synthetic corpus",
    "corpus": "a small synthetic speech corpus, made offline",
    "manifest": "train.tsv and valid.tsv of a folder of audio, which is checked and converted to 16 kHz mono once",
    "recipe": "both phases of pre-training, from recordings to an export, and then one bit; or an estimate of what they need",
    "binarize-recipe": "training at one bit in stages, W32A32 -> W1A2 -> W1A1, each distilled from the one before",
    "labels": "k-means labels from MFCC or from a layer of a checkpoint; their quality",
    "profile": "parameters, storage and operations of a preset or a checkpoint; the paper's Table 1",
    "bench": "measured latency, memory and throughput, and where the time goes",
    "export": "one file to ship: packed bits or float weights with a model card; or ONNX",
    "run": "hidden states of audio files, by a checkpoint, an export or a preset",
    "align": "the time of each letter and word, from gradients; whether an encoder reverses time",
    "trends": "mean and variance of every layer over training, and alarms",
    "transcribe": "the text of recordings, manifests and streams by a fine-tuned model; word error rates",
    "superb": "the ten SUPERB tasks through S3PRL: list, check, run and report them",
    "report": "training curves, costs, quality over cost and shares of time on one HTML page",
}
EXAMPLES = {
    "doctor": "hubert-eff doctor",
    "config": "hubert-eff config conformer_s optim=scaled_adam --explain",
    "list": "hubert-eff list 'sparseformer-*'",
    "train": "hubert-eff train conformer_s task.data=DATA task.label_dir=LABELS",
    "demo": "hubert-eff demo --out demo",
    "corpus": "hubert-eff corpus demo --out speech --minutes 20",
    "manifest": "hubert-eff manifest LibriSpeech --out data --folder-level 2 --valid-speakers 84,174",
    "recipe": "hubert-eff recipe LibriSpeech --config conformer_s --out run --folder-level 2 --dry-run",
    "binarize-recipe": "hubert-eff binarize-recipe data labels --out one-bit --config debug",
    "labels": "hubert-eff labels data --out data/mfcc --features mfcc --clusters 100",
    "profile": "hubert-eff profile conformer-s conformer-s+w1a1",
    "bench": "hubert-eff bench conformer-s --seconds 1 10 --threads 1",
    "export": "hubert-eff export checkpoint_best.pt --out model.safetensors",
    "run": "hubert-eff run model.safetensors speech --out features.npz --layer 9",
    "align": "hubert-eff align checkpoint_best.pt a.wav 'what is said in it' --out alignment",
    "trends": "hubert-eff trends run --out trends",
    "transcribe": "hubert-eff transcribe checkpoint_best.pt --manifest data --split valid --score",
    "superb": "hubert-eff superb run --task ks sid --upstream checkpoint_best.pt --data superb --out results",
    "report": "hubert-eff report run --out page",
}


def _module(command: str) -> Any:
    return importlib.import_module(f"hubert_eff.commands.{command.replace('-', '_')}")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong on one line, without the usage."""

    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as any parser does, and keep the arguments for `error`."""
        self._given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        if message.startswith("the following arguments are required") and (wrong := self._misspelled()):
            message = f"unrecognized arguments: {wrong}"  # argparse names what is missing first
        message += self._nearest(message)
        self.exit(2, f"{self.prog}: {printable(message)} (--help lists the options)\n")

    def _nearest(self, message: str) -> str:
        """A hint at the nearest name for an unknown command or option, which argparse names in its message."""
        wrong = re.search(r"invalid choice: '([^']*)'|unrecognized arguments: (-[^\s=]+)", message)
        if wrong is None:
            return ""
        known: Iterable[str] = self._known()
        if wrong[1]:
            known = re.findall(r"[\w-]+", message[wrong.end() :].removeprefix(" (choose from"))
        close = difflib.get_close_matches(wrong[1] or wrong[2], list(known), n=1, cutoff=0.5)
        return f" - did you mean {close[0]}?" if close else ""

    def _known(self) -> set[str]:
        """The options of this parser and of those directly below it."""
        below = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        parsers: list[argparse.ArgumentParser] = [self, *(parser for action in below for parser in action.choices.values())]
        return {option for parser in parsers for option in parser._option_string_actions}

    def _misspelled(self) -> str:
        """The first of the given options that is neither known nor the beginning of a known one; empty if there is none."""
        for word in self._given:
            name = word.partition("=")[0]
            if word == "--":
                break
            if name.startswith("--") and not any(option.startswith(name) for option in self._known()):
                return word
        return ""


class _CommandParser(_Parser):
    """Accepts options between positional arguments even if some of these are optional, which argparse cannot do before Python 3.13."""

    _parsing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as any parser does; argparse calls it for the command and again from `parse_known_intermixed_args`."""
        kinds = {action.nargs for action in self._get_positional_actions()}
        if self._parsing or not kinds & {argparse.ZERO_OR_MORE, argparse.OPTIONAL} or kinds & {argparse.PARSER, argparse.REMAINDER}:
            return super().parse_known_args(args, namespace)
        self._parsing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._parsing = False


def _parser(command: str | None) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="hubert-eff",
        usage="hubert-eff COMMAND [OPTION ...]",
        description="Speech encoders that are cheap to run.",
        epilog=_commands_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", help=argparse.SUPPRESS, prog="hubert-eff", parser_class=_CommandParser
    )
    for name, summary in COMMANDS.items():
        sub = commands.add_parser(
            name,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"Example: {EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == command:
            _module(name).add_arguments(sub)
    return parser


def _commands_text() -> str:
    """List the commands, grouped by purpose."""
    lines = []
    for group, names in GROUPS.items():
        lines += ["", f"{group}:", *(f"  {name:<16} {COMMANDS[name]}" for name in names)]
    return "\n".join([*lines[1:], "", "hubert-eff COMMAND --help lists the options of a command and shows an example."])


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 failed or done in part, 2 bad input (one line on stderr), 130 or 143 stopped."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((a for a in arguments if not a.startswith("-")), None)
    program = f"hubert-eff {command}" if command in COMMANDS else "hubert-eff"
    with stoppable() as received:
        try:
            return _run(command, arguments)
        except BaseException as error:
            if received or isinstance(error, KeyboardInterrupt):  # whatever error an interrupted import or library turns it into
                # a command that can resume says so in the KeyboardInterrupt that it passes on
                return say_stopped(program, received, printable(error) if isinstance(error, KeyboardInterrupt) else "")
            if isinstance(error, BrokenPipeError):
                sys.stderr.close()
                return 0
            if not isinstance(error, (UserError, StepFailed, OSError)):
                raise
            print(f"{program}: {printable(error)}", file=sys.stderr)
            # an OSError may be a full disk or a folder that has been deleted
            return 2 if isinstance(error, UserError) else error.code if isinstance(error, StepFailed) else 1


def _run(command: str | None, arguments: Sequence[str]) -> int:
    parser = _parser(command)
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
    return int(_module(args.command).run(args))


if __name__ == "__main__":
    sys.exit(main())
