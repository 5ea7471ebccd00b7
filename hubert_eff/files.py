"""Where the package's own files are; writing files so that a reader, or a crash, never sees half of one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any

from .errors import UserError


def config_dir() -> Path:
    """The folder of configurations: inside an installed package, or at the top of a checkout."""
    package = Path(__file__).resolve().parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def writable(folder: str | os.PathLike[str]) -> Path:
    """A folder that files may be written to, made where it is not there. Raises `UserError` where that cannot be."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {path} cannot be made: {error.strerror}") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"the folder {path} cannot be written to")
    return path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is renamed onto `path`, on error it is removed.

    Raises `UserError` as `writable` does, and where `path` is a folder.
    """
    target = Path(path)
    writable(target.parent)
    if target.is_dir():
        raise UserError(f"{target} is a folder: name a file")
    # the suffix is kept last: soundfile and numpy read the format from it; machines that share the folder may share numbers of processes
    temporary = target.with_name(f".{target.stem}.{os.getpid()}-{token_hex(4)}.tmp{target.suffix}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` as a whole."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON to `path` as a whole."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
