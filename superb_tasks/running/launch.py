"""The common part of the two launchers: checks of the command line before heavy imports, and errors as one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from hubert_eff.errors import UserError, printable
from hubert_eff.utils.signals import say_stopped, stoppable

S3PRL = "s3prl:"  # begins the name of S3PRL's own upstreams


def exit_code(program: str, run: Callable[[Sequence[str]], None], argv: Sequence[str] | None) -> int:
    """Run a launcher: 0 when done, 2 with one line on stderr for bad input, 130 or 143 when stopped."""
    if not sys.stderr.isatty():  # in a log, S3PRL's progress bars print a line now and then instead of ten a second
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # read when tqdm is imported
    with stoppable() as received:
        try:
            run(sys.argv[1:] if argv is None else argv)
        except BaseException as error:
            if received or isinstance(error, KeyboardInterrupt):
                return say_stopped(program, received)
            if not isinstance(error, UserError):
                raise
            print(f"{program}: {printable(error)}", file=sys.stderr)
            return 2
    return 0


@contextmanager
def command_line(*arguments: str) -> Iterator[None]:
    """The arguments of this process, for S3PRL's parsers, which take none."""
    argv, sys.argv = sys.argv, [sys.argv[0], *arguments]
    try:
        yield
    finally:
        sys.argv = argv


def read_config(path: str) -> dict[str, Any]:
    """Read a YAML mapping. Raises `UserError` if the file is missing or holds something else."""
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise UserError(f"config {path} is not a mapping of settings")
    return config


def lookup(config: Mapping[str, Any], dotted: str) -> Any:
    """The value under a dotted key of nested mappings, None if there is none."""
    value: Any = config
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def folder(value: str | None, argument: str) -> Path:
    """The folder given by an argument. Raises `UserError` that names the argument if there is none."""
    if not value:
        raise UserError(f"name the folder of the data: {argument} DIR")
    if not Path(value).is_dir():
        raise UserError(f"{argument}: no folder at '{value}'")
    return Path(value)


def check_keywords(root: Path, test_root: Path) -> None:
    """Raise `UserError`, which also says how to generate a corpus, unless both folders are laid out as S3PRL reads Speech Commands."""
    from ..data.generators import speech_commands

    try:
        speech_commands.check_keywords(root, test_root)
    except UserError as error:
        raise UserError(f"{error} (hubert-eff corpus superb --task ks --out DIR generates such a corpus)") from error


def device_arguments(given: bool) -> list[str]:
    """`--device cpu` where S3PRL's default, cuda, would fail and the user has not chosen."""
    import torch

    return [] if given or torch.cuda.is_available() else ["--device", "cpu"]


def upstream_arguments(source: str) -> list[str]:
    """The arguments of run_downstream for an upstream: ours for a checkpoint or preset, or S3PRL's own for `s3prl:NAME`."""
    if not source.startswith(S3PRL):
        return ["-u", "hubert_eff", "-k", source]
    return ["-u", source.removeprefix(S3PRL)]


def check_upstream(name: str | None, source: str | None) -> None:
    """Raise `UserError` if the upstream is ours and cannot be loaded: S3PRL would find out after preparing its data."""
    if name == "hubert_eff":
        from hubert_eff.checkpoints.open import open_model

        if not source:
            raise UserError("no upstream given: name a checkpoint file or a preset with -k / --build_upstream.path_or_url")
        open_model(source)
