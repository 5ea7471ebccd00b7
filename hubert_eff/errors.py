"""Errors that users are meant to see: what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


def printable(text: object) -> str:
    """`text` on one line, safe for a terminal: control codes, line ends and bytes that are not UTF-8 become \\n, \\x1b, \\udce9 etc."""
    line = str(text)
    return line if line.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


class UserError(ValueError):
    """Invalid input. The command line prints the message as one line and exits with code 2; the message may hold raw names from files."""

    def __str__(self) -> str:
        return printable(super().__str__())


class WriteError(OSError):
    """A file cannot be written, as on a full disk: errno, reason, name. The command line prints one line and exits with code 1."""

    def __str__(self) -> str:
        reason = f"{self.filename} cannot be written ({self.strerror})"
        return printable(f"{reason}. The old content is intact: make room and run it again")


class UnusableFile(UserError):
    """One of many files cannot be used; it is left out if the others can be used."""


# what building a model of absurd sizes may raise
BUILD_ERRORS = (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)


class StepFailed(Exception):
    """A step of a longer job failed; its exit code becomes that of the job."""

    def __init__(self, title: str, code: int) -> None:
        super().__init__(f"the step '{title}' ended with exit code {code}; its messages are above; the same command resumes there")
        self.code = code


def short(text: object, most: int = 200) -> str:
    """A text from a file on one line of at most `most` characters."""
    line = printable(" ".join(str(text)[: 5 * most].split()))
    return line if len(line) <= most else line[:most] + "..."


@contextmanager
def about(file: str | os.PathLike[str]) -> Iterator[None]:
    """Put the name of a file before a `UserError` that does not begin with it."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(printable(file)):
            raise
        raise UserError(f"{file}: {error}") from error


MANY = 20  # names beyond which an error lists only the nearest
NEAREST = 5


def unknown(kind: str, name: object, known: Iterable[str], command: str = "") -> UserError:
    """A `UserError` for an unknown name that offers the nearest one, and lists all, or of `MANY` those near it.

    Args:
        kind: what the name stands for, such as "preset".
        name: the unknown name.
        known: the names that exist.
        command: the command that shows all names, for lists that may be long.

    Returns:
        The error to raise.
    """
    names, said = sorted(known), short(name)
    longer = sorted((known for known in names if len(said) > 2 and known.startswith(said)), key=len)
    near = list(dict.fromkeys([*longer, *difflib.get_close_matches(said, names, n=NEAREST, cutoff=0.5)]))[:NEAREST]
    hint = f" - did you mean '{near[0]}'?" if near else "."
    if len(names) <= MANY or not (near or command):
        return UserError(f"unknown {kind} '{said}'{hint} Known: {', '.join(names) or 'none'}")
    others = f" Near it: {', '.join(near[1:])}." if near[1:] else ""
    return UserError(f"unknown {kind} '{said}'{hint}{others}" + (f" `{command}` shows all" if command else f" ({len(names)} are known)"))


def missing_extra(package: str, extra: str, purpose: str) -> UserError:
    """A `UserError` for an optional package that is not installed."""
    return UserError(f"{purpose} needs the package '{package}': pip install 'hubert-eff[{extra}]'")


def require(package: str, extra: str, purpose: str) -> None:
    """Raise `missing_extra` if an optional package is not installed, before the work whose result needs it."""
    if importlib.util.find_spec(package) is None:
        raise missing_extra(package, extra, purpose)
