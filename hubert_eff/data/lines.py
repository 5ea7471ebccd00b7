"""Reads text files of others line by line, by bytes, so that all readers agree on what a line is.

A line ends at a line feed, with or without a carriage return before it; the last line may lack it. `str.splitlines` and text mode also end
lines at other characters, each at its own, and so count the lines of one file differently: files with such characters are refused.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..errors import UserError

LONGEST = 1 << 26  # bytes of a line; longer ones may expand without end
MOST_JSON = 1 << 26  # bytes of a JSON file
MOST_BLANK = 1000  # most blank lines in a file of JSON lines
PLAIN = bytes([9, *range(32, 127)])  # bytes that need no closer look
CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")
DECIMAL = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class Digest(Protocol):
    """The interface of hashlib's digests."""

    def update(self, data: bytes, /) -> None:
        """Add bytes."""


class Line(NamedTuple):
    """A line: its number from 1, the position of its first byte, and its bytes without the line end, which are UTF-8."""

    number: int
    start: int
    raw: bytes


def scan(file: Path, hint: str, digest: Digest | None = None) -> Iterator[Line]:
    """Read the lines of a file. `digest` gets all of its bytes; `hint` says what to do if the file cannot be read.

    Raises `UserError`, naming the line, for bytes that are not UTF-8, control characters other than the tab, and characters at which only
    some readers end a line.
    """
    place = 0
    try:
        if not file.is_file():  # opening a pipe would wait for its writer
            raise UserError(f"no file {file}: {hint}")
        with file.open("rb") as stream:
            for number, raw in enumerate(iter(partial(stream.readline, LONGEST + 1), b""), start=1):
                if len(raw) > LONGEST:
                    raise UserError(f"{file}, line {number} is longer than {LONGEST >> 20} MB: {hint}")
                if digest is not None:
                    digest.update(raw)
                begin = len(codecs.BOM_UTF8) if number == 1 and raw.startswith(codecs.BOM_UTF8) else 0
                line = Line(number, place + begin, _without_end(raw[begin:]))
                if line.raw.translate(None, PLAIN):
                    _refuse_odd(line, file, hint)
                yield line
                place += len(raw)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): {hint}") from error


def read_lines(file: Path, hint: str) -> Iterator[tuple[int, str]]:
    """Read number and text of each line of a file. Raises `UserError` as `scan` does."""
    return ((line.number, line.raw.decode()) for line in scan(file, hint))


def read_json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    """Read place and content of each line of a file of JSON lines, which may be compressed. Raises `UserError` if it cannot."""
    number, blank = 0, 0
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            for number, raw in enumerate(iter(partial(stream.readline, LONGEST + 1), b""), start=1):
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if len(raw) > LONGEST or blank > MOST_BLANK:
                    raise ValueError(f"longer than {LONGEST >> 20} MB" if len(raw) > LONGEST else f"more than {MOST_BLANK} blank lines")
                if text:
                    yield f"{file}, line {number}", json.loads(text)
                else:
                    blank += 1
    except (OSError, EOFError, zlib.error, RecursionError, ValueError) as error:  # endless digits too raise ValueError
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}, line {max(number, 1)}, cannot be read as JSON lines: {shown(str(error))}") from error


def read_json(file: Path, hint: str) -> dict[str, Any]:
    """Read the object in a JSON file. Raises `UserError` for other content; `hint` says what to do then."""
    try:
        with file.open("rb") as stream:
            raw = stream.read(MOST_JSON + 1)
        if len(raw) > MOST_JSON:
            raise ValueError(f"it is larger than {MOST_JSON >> 20} MB")
        content = json.loads(raw)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): {hint}") from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{file} is not valid JSON ({shown(str(error))}): {hint}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object but {value_shown(content)}: {hint}")
    return content


def decimal(text: str) -> float | None:
    """The value of a decimal number in ASCII, below 10^9 in size; None for other texts, even if Python reads them as numbers."""
    value = float(text) if len(text) < 40 and DECIMAL.fullmatch(text) else 1e9
    return value if abs(value) < 1e9 else None


def shown(text: str, most: int = 60) -> str:
    """The beginning of a text from a file, on one line and without control characters."""
    beginning = "".join(c if c.isprintable() else " " for c in text[:most])
    return " ".join(beginning.split())


def value_shown(value: object) -> str:
    """The beginning of a value from a JSON file; only the type of one that may be nested."""
    return shown(repr(value), 40) if isinstance(value, str | float | int | None) else f"a {type(value).__name__}"


def one_line(text: str) -> str:
    """A text without control characters, with single spaces for blanks."""
    return " ".join(CONTROL.sub(" ", text).split())


def _without_end(raw: bytes) -> bytes:
    return raw[:-2] if raw.endswith(b"\r\n") else raw.removesuffix(b"\n")


def _refuse_odd(line: Line, file: Path, hint: str) -> None:
    try:
        found = CONTROL.search(line.raw.decode())
    except UnicodeDecodeError as error:
        place = line.start + error.start
        raise UserError(f"{file} is not UTF-8 text ({error.reason} at byte {place}), line {line.number}: {hint}") from error
    if found and found[0] == "\r":
        raise UserError(f"{file}, line {line.number} holds a carriage return that ends no line: end lines with line feeds (mac2unix)")
    if found:
        raise UserError(
            f"{file}, line {line.number} holds the character U+{ord(found[0]):04X}, at which some programs end a line or a text: {hint}"
        )
